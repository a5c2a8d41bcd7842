"""DHE: many hashes of an id, put through a network; no table at all."""

from dataclasses import dataclass
from math import pi
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import DecodeMethod, Decoder, TableSpec, check_positive

Activation = Literal["mish", "relu"]
Encoding = Literal["uniform", "gaussian"]
Norm = Literal["batch", "layer"]

_RANGE = 10**6  # m, of the hash functions
_CHUNK = 1 << 22  # hash values that are computed at once
_SAMPLE = 1024  # ids on which the layers are scaled at the start


class DHEDecoder(Decoder):
    """Hash values as numbers of mean 0, then a perceptron of equally wide hidden layers.

    Parameters: ``weights`` and ``biases`` of each layer, ``scales`` and ``shifts`` [layers, width] of the norms. Buffers:
    ``coefficients`` of the hash functions, ``running_means`` and ``running_vars`` [layers, width] of batch norms.
    """

    coefficients: Tensor
    running_means: Tensor
    running_vars: Tensor

    def __init__(self, method: "DHE", table: TableSpec) -> None:
        super().__init__()
        self._method, self._std = method, table.std
        self._key = (method.seed, table.name, method.key)
        shapes = method.layer_shapes(table.embedding_dim)
        options: dict[str, Any] = {"dtype": table.dtype, "device": table.device}
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape, **options)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(shape[0], **options)) for shape in shapes)
        if method.norm is not None:
            self.scales = nn.Parameter(torch.empty(method.depth, method.width, **options))
            self.shifts = nn.Parameter(torch.empty(method.depth, method.width, **options))
        if method.norm == "batch":
            self.register_buffer("running_means", torch.empty(method.depth, method.width, device=table.device))
            self.register_buffer("running_vars", torch.empty(method.depth, method.width, device=table.device))
        self.register_buffer(
            "coefficients", torch.empty(1 + method.num_functions, dtype=torch.int64, device=table.device)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.coefficients.copy_(hash_coefficients(self._method.num_functions, *self._key))
        if self._method.norm is not None:
            self.scales.fill_(1)
            self.shifts.zero_()
        if self._method.norm == "batch":
            self.running_means.zero_()
            self.running_vars.fill_(1)
        x_NH = self.encode(torch.arange(_SAMPLE, device=self.coefficients.device))
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight_OH = torch.randn(weight.shape, device=weight.device)
            out_NO = x_NH @ weight_OH.T
            std_O, mean_O = torch.std_mean(out_NO, dim=0, correction=0)
            # No scale makes units vary that are the same for all ids, such as those after a layer norm of width 2 can be.
            spread_O = torch.where(std_O > 1e-3, std_O, 1)
            gain_O = (self._std if layer == last else 1) / spread_O
            weight.copy_(weight_OH * gain_O[:, None])
            bias.copy_(-mean_O * gain_O)
            if layer < last:
                x_NH = self._activate((out_NO - mean_O) * gain_O, layer, training=False)

    def encode(self, ids_N: Tensor) -> Tensor:
        """Hash values as float32 numbers: uniform on [-1, 1], or standard Gaussian by the Box-Muller transform."""
        hashes = self._method.num_hashes
        out_NK = torch.empty(len(ids_N), hashes, device=ids_N.device)
        chunk = max(1, _CHUNK // self._method.num_functions)
        for ids, out in zip(ids_N.split(chunk), out_NK.split(chunk), strict=True):
            values = hash_rows(ids, self.coefficients, _RANGE).T.float()
            if self._method.encoding == "uniform":
                out.copy_(values * (2 / (_RANGE - 1)) - 1)
            else:
                first, second = (values / _RANGE).chunk(2, dim=1)
                radius, angle = (-2 * (first + 1 / _RANGE).log()).clamp(min=0).sqrt(), second * (2 * pi)
                out.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :hashes])
        return out_NK

    def forward(self, ids_N: Tensor) -> Tensor:
        x_NH = self.encode(ids_N)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x_NH = F.linear(x_NH, weight.float(), bias.float())
            if layer < last:
                # Of no or one id there is no variance: it is normalised as outside training.
                x_NH = self._activate(x_NH, layer, training=self.training and len(ids_N) > 1)
        return x_NH

    def _activate(self, x_NH: Tensor, layer: int, training: bool) -> Tensor:
        """Norm and activation of a hidden layer."""
        method = self._method
        if method.norm is not None:
            scale_H, shift_H = self.scales[layer].float(), self.shifts[layer].float()
            if method.norm == "layer":
                x_NH = F.layer_norm(x_NH, (method.width,), scale_H, shift_H)
            else:
                mean_H, var_H = self.running_means[layer], self.running_vars[layer]
                x_NH = F.batch_norm(x_NH, mean_H, var_H, scale_H, shift_H, training)
        return F.mish(x_NH) if method.activation == "mish" else F.relu(x_NH)


@dataclass(frozen=True, kw_only=True)
class DHE(DecodeMethod):
    """Deep hash embeddings: vector(id) = MLP( x_1(id), .., x_k(id) ), where x_i is a hash of the id as a number.

    Hash values in [0, 10^6) become uniform numbers on [-1, 1], or pairs of them standard Gaussian ones. Hidden layers are
    x -> act(W x + b), the last layer is linear. Nothing is stored by id, and any int64 is an id.

    Ours rather than the paper's: each layer's initial weights and biases are scaled and shifted so that, over ids, every
    unit has mean 0 and variance 1, and every dim of the vectors the variance of the full table's. There are two hidden
    layers and no norms where nothing else is said; the paper's deeper networks want batch norms. A budget buys width, with
    about eight hashes a unit up to the paper's 1024, and what is left buys further hashes: it is met within 5% from width 4
    on. Batch norms use the statistics of the ids of a batch (of each rank alone) while training, and running ones otherwise.

    Args:
        width: of the hidden layers.
        num_hashes: k, hash functions.
        depth: hidden layers.
        encoding: "uniform" or "gaussian".
        activation: "mish" or "relu".
        norm: "batch" or "layer" before each activation; None by default.
        seed: of the hash functions; the table's name is part of the seed.

    Paper: Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation", KDD 2021,
    arXiv 2010.10784.

    Example:
        >>> DHE(width=64).num_params(10_000, 16)  # 64 (1024 + 1) + 64 (64 + 1) + 16 (64 + 1)
        70800
    """

    key: ClassVar[str] = "dhe"

    width: int
    num_hashes: int = 1024
    depth: int = 2
    encoding: Encoding = "uniform"
    activation: Activation = "mish"
    norm: Norm | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(width=self.width, num_hashes=self.num_hashes, depth=self.depth)
        for name, choices in (("encoding", Encoding), ("activation", Activation)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}.")
        if self.norm is not None and self.norm not in get_args(Norm):
            raise ValueError(f"norm={self.norm!r} is not one of {', '.join(get_args(Norm))}, nor None.")
        if self.norm == "layer" and self.width == 1:
            raise ValueError("width=1 has a layer norm that is always 0; the smallest width that works is 2.")

    @property
    def num_functions(self) -> int:
        """Hash functions; two make a pair of Gaussian numbers."""
        return self.num_hashes + (self.num_hashes % 2 if self.encoding == "gaussian" else 0)

    def layer_shapes(self, embedding_dim: int) -> list[tuple[int, int]]:
        """(out, in) of each layer's weight."""
        widths = [self.num_hashes, *[self.width] * self.depth, embedding_dim]
        return list(zip(widths[1:], widths[:-1], strict=True))

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        norms = 0 if self.norm is None else 2 * self.depth * self.width
        return norms + sum(outputs * (inputs + 1) for outputs, inputs in self.layer_shapes(embedding_dim))

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        fixed = overrides.get("width")

        def sized(width: int) -> DHE:
            """With the fewest hashes: where the width is given, hashes are all that can be chosen."""
            num_hashes = 1 if fixed else min(8 * width - 7, cls.num_hashes)
            return cls(**{"width": width, "num_hashes": num_hashes, **overrides})

        def size(width: int) -> int:
            return sized(width).num_params(num_embeddings, embedding_dim)

        low = fixed or (2 if overrides.get("norm") == "layer" else 1)
        high = fixed or max(num_params, low)
        if size(low) > num_params:
            raise ValueError(
                f"{cls.key}: a budget of {num_params} parameters is too small at embedding_dim={embedding_dim}; "
                f"the smallest possible is {size(low)}."
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(middle) <= num_params else (low, middle - 1)
        return {"width": low, "num_hashes": sized(low).num_hashes + (num_params - size(low)) // low}

    def decoder(self, table: TableSpec) -> Decoder:
        return DHEDecoder(self, table)
