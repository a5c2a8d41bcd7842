"""Bloom embeddings: an id is a Bloom filter, the set of a few hashed rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cce_torchrec.methods.base import Column, RowMap, RowMethod, budget_rows, check_positive, check_rows
from cce_torchrec.methods.ce import HashedRowMap


@dataclass(frozen=True, kw_only=True)
class Bloom(RowMethod):
    """Bloom embeddings: vector(id) = 1/n sum_{j < n} W[h_j(id)].

    Two ids share a vector only where all n rows are the same, which is rare; single rows are shared freely.

    Args:
        num_rows: k, rows of the table.
        num_hashes: n, hashed rows of an id. The paper finds a few to be best; it compares 3, 4 and 5.
        seed: of the hash functions; the table's name is part of the seed.

    Paper: Serrà & Karatzoglou, "Getting Deep Recommenders Fit: Bloom Embeddings for Sparse Binary Input/Output Networks",
    RecSys 2017, arXiv 1706.03993. There a set of ids is one binary filter, in which a row that two ids (or two hashes)
    share counts once, and rows are added up; here every id is a mean of its own, which a bag then pools.

    Example:
        >>> Bloom(num_rows=100).num_params(10_000, 16)
        1600
    """

    key: ClassVar[str] = "bloom"

    num_rows: int
    num_hashes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows)
        check_positive(num_hashes=self.num_hashes)

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.num_rows * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        return {"num_rows": budget_rows(cls.key, num_params, embedding_dim, smallest=overrides.get("num_rows", 1))}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        columns = (Column(self.num_rows, embedding_dim),)
        return HashedRowMap(columns, (self.seed, table, self.key), device, num_hashes=self.num_hashes)
