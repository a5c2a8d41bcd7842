"""Compositional embeddings by concatenation (CE): every column of the vector is hashed on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import (
    Column,
    RowMap,
    RowMethod,
    RowSource,
    budget_rows,
    check_divides,
    check_positive,
    check_rows,
    default_num_columns,
)
from cce_torchrec.methods.blocks import Assignments, BlockRowMap, check_assignments
from cce_torchrec.native.rows import write_hashed_rows


class HashedRowMap(RowMap):
    """The mean of ``num_hashes`` hashed rows in every column; all of an id's with one hashed sign, where there is one."""

    coefficients: Tensor
    sign_coefficients: Tensor | None

    def __init__(
        self,
        columns: tuple[Column, ...],
        key: tuple[object, ...],
        device: torch.device | None,
        *,
        num_hashes: int = 1,
        sign: bool = False,
    ) -> None:
        super().__init__()
        self.columns, self.rows_per_id, self.scale = columns, num_hashes, 1 / num_hashes
        self.has_row_weights, self._key = sign, key
        sign_coefficients = torch.empty(2, dtype=torch.int64, device=device) if sign else None
        self.register_buffer("sign_coefficients", sign_coefficients)
        self.register_buffer(
            "coefficients", torch.empty(1 + len(columns) * num_hashes, dtype=torch.int64, device=device)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.coefficients.copy_(hash_coefficients(len(self.coefficients) - 1, *self._key))
        if self.sign_coefficients is not None:
            self.sign_coefficients.copy_(hash_coefficients(1, *self._key, "sign"))

    def rows(self, ids_N: Tensor) -> Tensor:
        rows_FN = hash_rows(ids_N, self.coefficients, self.columns[0].num_rows)
        return rows_FN.view(len(self.columns), self.rows_per_id, -1).transpose(1, 2).contiguous()

    def row_weights(self, ids_N: Tensor) -> Tensor:
        assert self.sign_coefficients is not None
        return hash_rows(ids_N, self.sign_coefficients, 2).unsqueeze(-1) * 2.0 - 1.0

    def source(self) -> RowSource | None:
        if self.has_row_weights:
            return None
        return RowSource(
            coefficients=self.coefficients, num_hashes=self.rows_per_id, num_hashed_rows=self.columns[0].num_rows
        )

    def write_rows(self, ids_N: Tensor, values_M: Tensor, starts_C: Sequence[int | None]) -> bool:
        if self.rows_per_id > 1:
            return False
        return write_hashed_rows(ids_N, self.coefficients, self.columns[0].num_rows, values_M, starts_C)


@dataclass(frozen=True, kw_only=True)
class CE(RowMethod):
    """Compositional embeddings, concatenated: vector(id) = concat_i W_i[h_i(id)].

    Two ids share a vector only where all c hashes collide, which is rare even with few rows.

    Args:
        num_rows: k, rows of each column's codebook.
        num_columns: c, columns; must divide the embedding dim. Each is ``embedding_dim / c`` wide. More columns of as many
            parameters are better (``docs/results/siblings.md``) and slower; :meth:`from_budget` takes up to 8 whose width
            FBGEMM's kernels take.
        assignments: "hash", or "blocks": h_i(id) = floor((k id + floor(i V / c)) / V) mod k, so that consecutive ids share a
            row, in each column others; see :class:`HashingTrick`.
        seed: of the hash functions; the table's name is part of the seed.

    Paper: Shi et al., "Compositional Embeddings Using Complementary Partitions", KDD 2020, arXiv 1909.02107. The paper's
    partitions are quotients and remainders (see :class:`QR`); here they are hash functions, so any id is allowed.

    Example:
        >>> CE(num_rows=100, num_columns=4).num_params(10_000, 16)
        1600
    """

    key: ClassVar[str] = "ce"

    num_rows: int
    num_columns: int = 8
    assignments: Assignments = "hash"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows)
        check_positive(num_columns=self.num_columns)
        check_assignments(assignments=self.assignments)

    def sizes(self) -> dict[str, Any]:
        sizes = super().sizes()
        return {name: size for name, size in sizes.items() if name != "assignments" or size != "hash"}

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        check_divides(embedding_dim, self.num_columns)
        return self.num_rows * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        rows = budget_rows(cls.key, num_params, embedding_dim, smallest=overrides.get("num_rows", 1))
        return {"num_rows": rows, "num_columns": default_num_columns(embedding_dim, at_most=8)}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        check_divides(embedding_dim, self.num_columns)
        columns = (Column(self.num_rows, embedding_dim // self.num_columns),) * self.num_columns
        if self.assignments == "blocks":
            return BlockRowMap(columns, num_embeddings)
        return HashedRowMap(columns, (self.seed, table, self.key), device)
