"""Hash embeddings: a few hashed rows of one table, weighted by learned numbers of each id's own."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import DecodeMethod, Decoder, TableSpec, check_bool, check_positive, check_rows


class HashEmbeddingDecoder(Decoder):
    """Rows and weights by hash.

    Parameters: ``components`` [B, D'], ``importance`` [P, n]. Buffers: ``row_coefficients`` int64 [1 + n] and
    ``weight_coefficients`` int64 [2].
    """

    row_coefficients: Tensor
    weight_coefficients: Tensor

    def __init__(self, method: "HashEmbedding", table: TableSpec) -> None:
        super().__init__()
        self._method, self._std = method, table.std
        self._key = (method.seed, table.name, method.key)
        options: dict[str, Any] = {"dtype": table.dtype, "device": table.device}
        width = method.component_dim(table.embedding_dim)
        self.components = nn.Parameter(torch.empty(method.num_rows, width, **options))
        self.importance = nn.Parameter(torch.empty(method.num_weights, method.num_hashes, **options))
        for name, functions in (("row_coefficients", method.num_hashes), ("weight_coefficients", 1)):
            self.register_buffer(name, torch.empty(1 + functions, dtype=torch.int64, device=table.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        method = self._method
        self.row_coefficients.copy_(hash_coefficients(method.num_hashes, *self._key, "rows"))
        self.weight_coefficients.copy_(hash_coefficients(1, *self._key, "weights"))
        # A sum of n products has n times the variance of one; weights that are a part of the vector have its spread.
        weight_std, component_std = (self._std, 1.0) if method.concat_weights else (1.0, self._std)
        component_std *= method.num_hashes**-0.5
        for parameter, std in ((self.importance, weight_std), (self.components, component_std)):
            parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * std)

    def forward(self, ids_N: Tensor) -> Tensor:
        rows_nN = hash_rows(ids_N, self.row_coefficients, self._method.num_rows)
        (weights_N,) = hash_rows(ids_N, self.weight_coefficients, self._method.num_weights)
        importance_Nn = F.embedding(weights_N, self.importance.float())
        components = self.components.float()
        out_ND = torch.zeros(len(ids_N), components.shape[1], device=ids_N.device)
        for weight_N, row_N in zip(importance_Nn.unbind(1), rows_nN, strict=True):
            out_ND = torch.addcmul(out_ND, weight_N[:, None], F.embedding(row_N, components))
        return torch.cat([out_ND, importance_Nn], dim=1) if self._method.concat_weights else out_ND


@dataclass(frozen=True, kw_only=True)
class HashEmbedding(DecodeMethod):
    """Hash embeddings: vector(id) = sum_{j < n} p_j(id) E[h_j(id)], where p(id) = P[h'(id)] are learned weights.

    Ids that share all their rows still differ by their weights. Every function hashes the id itself, where in the paper the
    rows' functions hash h'(id), so that ids with the same weights would have the same rows too. Nothing is stored by id,
    and any int64 is an id.

    At the start components and weights are Gaussian, as in the paper, but of a spread that gives vectors that of the full
    table's. A budget is cut in halves for weights and components, as the paper's sizes are, but for no more weights than
    there are ids; it is met to n - 1 parameters.

    Args:
        num_rows: B, component vectors.
        num_weights: P, rows of the table of weights.
        num_hashes: n, components of an id.
        concat_weights: whether the weights are the last n dims of the vector; components then have D - n.
        seed: of the hash functions; the table's name is part of the seed.

    Raises:
        ValueError: where concatenated weights leave no dims for the components.

    Paper: Svenstrup et al., "Hash Embeddings for Efficient Word Representations", NIPS 2017, arXiv 1709.03933.

    Example:
        >>> HashEmbedding(num_rows=100, num_weights=1000).num_params(10_000, 16)
        3600
    """

    key: ClassVar[str] = "hash_embedding"

    num_rows: int
    num_weights: int
    num_hashes: int = 2
    concat_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows, num_weights=self.num_weights)
        check_positive(num_hashes=self.num_hashes)
        check_bool(concat_weights=self.concat_weights)

    def component_dim(self, embedding_dim: int) -> int:
        """D', dims of a component."""
        if not self.concat_weights:
            return embedding_dim
        if self.num_hashes >= embedding_dim:
            raise ValueError(
                f"concat_weights with num_hashes={self.num_hashes} leaves no components at embedding_dim={embedding_dim}: "
                f"use num_hashes={embedding_dim - 1} or less, or an embedding_dim of {self.num_hashes + 1}."
            )
        return embedding_dim - self.num_hashes

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.num_rows * self.component_dim(embedding_dim) + self.num_weights * self.num_hashes

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        # With one row of weights, all ids that share their rows would be the same.
        smallest = cls(**{"num_rows": 1, "num_weights": 2, **overrides})
        width, hashes = smallest.component_dim(embedding_dim), smallest.num_hashes
        needed = smallest.num_params(num_embeddings, embedding_dim)
        if needed > num_params:
            raise ValueError(
                f"{cls.key}: a budget of {num_params} parameters is too small at embedding_dim={embedding_dim}; "
                f"the smallest possible is {needed}."
            )
        weights = overrides.get("num_weights", max(2, min(num_embeddings, num_params // (2 * hashes))))
        rows = overrides.get("num_rows", max(1, (num_params - weights * hashes) // width))
        return {"num_rows": rows, "num_weights": (num_params - rows * width) // hashes}

    def decoder(self, table: TableSpec) -> Decoder:
        return HashEmbeddingDecoder(self, table)
