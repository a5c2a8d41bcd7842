"""What the tests of decode methods share: building one, and checks of it against a dense table written from its paper."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cce_torchrec.methods import DecodeMethod, Decoder, MethodConfig, TableSpec

Dense = Callable[[dict[str, Tensor]], Tensor]  # float64 parameters by name -> [V, D]


def build(method: DecodeMethod, num_embeddings: int, embedding_dim: int, seed: int = 0, **spec: Any) -> Decoder:
    """The decoder of table "t", whose vectors have the standard deviation 0.5 where nothing else is said."""
    defaults = {"name": "t", "std": 0.5, "dtype": torch.float32, "device": None}
    torch.manual_seed(seed)
    return method.decoder(
        TableSpec(num_embeddings=num_embeddings, embedding_dim=embedding_dim, **(defaults | spec))  # type: ignore[arg-type]
    )


def check_against_dense(decoder: Decoder, dense: Dense, num_embeddings: int) -> None:
    """Vectors and gradients are those of the dense table, gradients in float64; some ids stand several times or never."""
    ids_N = torch.randint(0, num_embeddings, (3 * num_embeddings // 2,), generator=torch.Generator().manual_seed(1))
    out_ND = decoder(ids_N)
    target_ND = torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(2))
    (out_ND * target_ND).sum().backward()

    doubles = {name: p.detach().double().requires_grad_() for name, p in decoder.named_parameters()}
    dense_VD = dense(doubles)
    assert out_ND.dtype == torch.float32
    torch.testing.assert_close(out_ND.double(), dense_VD[ids_N], rtol=1e-4, atol=1e-5)
    (dense_VD[ids_N] * target_ND).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.any(), name
        scale = float(doubles[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad.double(), doubles[name].grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


def check_decoder(method: DecodeMethod, num_embeddings: int, embedding_dim: int) -> None:
    """What every decoder does: its count of parameters, no ids, half precision, seeds, the meta device, copies."""
    ids_N = torch.arange(num_embeddings)
    decoder = build(method, num_embeddings, embedding_dim)
    out_ND = decoder(ids_N)
    assert sum(p.numel() for p in decoder.parameters()) == method.num_params(num_embeddings, embedding_dim)
    assert decoder.stored_bytes() == sum(b.numel() * b.element_size() for b in decoder.buffers())
    assert out_ND.shape == (num_embeddings, embedding_dim)
    assert decoder(ids_N[:0]).shape == (0, embedding_dim)
    torch.testing.assert_close(decoder(ids_N[:1]), out_ND[:1])
    torch.testing.assert_close(decoder(ids_N.flip(0)), out_ND.flip(0))

    assert torch.equal(build(method, num_embeddings, embedding_dim)(ids_N), out_ND)
    assert not torch.equal(build(method, num_embeddings, embedding_dim, seed=1)(ids_N), out_ND)

    assert not build(method, num_embeddings, embedding_dim, std=0.0)(ids_N).any()

    meta = build(method, num_embeddings, embedding_dim, device=torch.device("meta"))
    assert {tensor.device.type for tensor in [*meta.parameters(), *meta.buffers()]} == {"meta"}
    meta.to_empty(device="cpu")
    torch.manual_seed(0)
    meta.reset_parameters()
    assert torch.equal(meta(ids_N), out_ND)

    twin = build(method, num_embeddings, embedding_dim, seed=1)
    twin.load_state_dict(copy.deepcopy(decoder).state_dict())
    assert torch.equal(twin(ids_N), out_ND)

    for dtype, rtol in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        half = build(method, num_embeddings, embedding_dim, dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {dtype}
        out = half(ids_N)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, out_ND, rtol=rtol, atol=rtol)
        out.square().sum().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())


def initial_std(method: DecodeMethod, num_embeddings: int, embedding_dim: int, draws: int = 20) -> float:
    """Root mean square of the elements of vectors over some draws of a decoder that shall have the std 0.5, over 0.5."""
    ids_N = torch.arange(num_embeddings) if num_embeddings <= 1000 else torch.randint(0, num_embeddings, (1000,))
    with torch.no_grad():
        squares = [
            build(method, num_embeddings, embedding_dim, seed=seed, name=f"t{seed}")(ids_N).square().mean()
            for seed in range(draws)
        ]
    return float(torch.stack(squares).mean().sqrt()) / 0.5


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def largest_tensor(decoder: Decoder, ids_N: Tensor) -> int:
    """Elements of the largest tensor of a forward and backward pass."""
    with _Largest() as largest:
        decoder(ids_N).square().sum().backward()
    return largest.numel


def check_budgets(
    method: type[MethodConfig], within: Callable[[Any], bool], dims: tuple[int, ...] = (4, 8, 12, 16, 32, 64, 128)
) -> None:
    """Over a grid of sizes: never above the budget, within 5% below it where ``within`` says so; the smallest is named."""
    checked = 0
    for num_embeddings in (10, 100, 12_345, 10**5, 10**6, 10**7):
        for dim in dims:
            with pytest.raises(ValueError, match=r"smallest possible is \d+\.$") as error:
                method.from_budget(num_embeddings, dim, 0)
            smallest = int(str(error.value).split()[-1].rstrip("."))
            assert method.from_budget(num_embeddings, dim, smallest).num_params(num_embeddings, dim) == smallest
            with pytest.raises(ValueError, match=rf"\b{smallest}\.$"):
                method.from_budget(num_embeddings, dim, smallest - 1)
            for ratio in (2, 3, 10, 50, 1000, 10_000):
                budget = num_embeddings * dim // ratio
                if budget < smallest:
                    continue
                config = method.from_budget(num_embeddings, dim, budget)
                size = config.num_params(num_embeddings, dim)
                assert size <= budget, config
                if within(config):
                    assert size >= 0.95 * budget, (config, num_embeddings, dim, budget)
                    checked += 1
    assert checked > 30
