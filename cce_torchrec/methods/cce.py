"""Clustered compositional embeddings (CCE): concatenated columns whose assignments are learned by re-clustering."""

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
    id_chunks,
)
from cce_torchrec.native.rows import write_assigned_rows


def smallest_int_dtype(num_values: int) -> torch.dtype:
    """The narrowest integer type that holds 0 .. ``num_values - 1``."""
    for dtype in (torch.uint8, torch.int16):
        if num_values - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """What each column is made of: ``num_assigned`` codebooks by stored assignment, then one by hash.

    Attributes:
        num_columns: c.
        num_assigned: A, codebooks whose rows are stored for each id.
        num_rows: k, rows of each of those.
        num_helper_rows: k', rows of the hashed one; 0 for none.
    """

    num_columns: int
    num_assigned: int
    num_rows: int
    num_helper_rows: int


class CCERowMap(RowMap):
    """Main rows by stored assignment, a helper row by hash; the helper rows follow the main ones in the column's table.

    Buffers: ``assignments`` [V, c * A] (row of each main codebook, column by column; of a block of ids after
    :meth:`keep_block`), ``helper_coefficients`` int64 [1 + c] and ``version`` (how many times it was re-clustered).
    """

    bounded = True
    assignments: Tensor
    helper_coefficients: Tensor | None
    version: Tensor

    def __init__(
        self,
        codebooks: Codebooks,
        key: tuple[object, ...],
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        columns, assigned = codebooks.num_columns, codebooks.num_assigned
        self.num_embeddings, self.first_id = num_embeddings, 0
        self.num_assigned, self.level_rows = assigned, codebooks.num_rows
        self.num_main_rows, self.num_helper_rows = assigned * codebooks.num_rows, codebooks.num_helper_rows
        self.rows_per_id = assigned + (self.num_helper_rows > 0)
        self.columns = (Column(self.num_main_rows + self.num_helper_rows, embedding_dim // columns),) * columns
        self._key = key
        dtype = smallest_int_dtype(codebooks.num_rows)
        helper = torch.empty(1 + columns, dtype=torch.int64, device=device) if self.num_helper_rows else None
        self.register_buffer("assignments", torch.empty(num_embeddings, columns * assigned, dtype=dtype, device=device))
        self.register_buffer("helper_coefficients", helper)
        self.register_buffer("version", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hash every id to main rows, the start before anything is learned."""
        device = self.assignments.device
        self.version.zero_()
        if self.helper_coefficients is not None:
            self.helper_coefficients.copy_(self.draw_helper_coefficients(0))
        if device.type == "meta":
            return
        coefficients = hash_coefficients(self.assignments.shape[1], *self._key, "main", device=device)
        for rows_N in id_chunks(len(self.assignments), device):
            hashed_FN = hash_rows(rows_N + self.first_id, coefficients, self.level_rows)
            self.assignments[rows_N[0] : rows_N[-1] + 1] = hashed_FN.T

    def keep_block(self, first_id: int, end: int, device: torch.device) -> None:
        """Hold the assignments of ids ``first_id .. end - 1`` only; other ids must not be asked for from then on."""
        self.first_id = first_id
        if self.assignments.device.type == "meta":
            width = self.assignments.shape[1]
            self.assignments = torch.empty(end - first_id, width, dtype=self.assignments.dtype, device=device)
            for name, buffer in self.named_buffers():
                if buffer.device.type == "meta":
                    setattr(self, name, torch.empty_like(buffer, device=device))
            self.reset_parameters()
        else:
            self.assignments = self.assignments[first_id:end].to(device, copy=True)

    def stored_bytes(self) -> int:
        """Of all ranks together where each holds a block."""
        row_bytes = self.assignments.shape[1] * self.assignments.element_size()
        return super().stored_bytes() + (self.num_embeddings - len(self.assignments)) * row_bytes

    def draw_helper_coefficients(self, version: int, *key: object) -> Tensor:
        """The helper hash functions that go with a version of the assignments, on the CPU."""
        return hash_coefficients(len(self.columns), *self._key, "helper", version, *key)

    def replace(self, assignments: Tensor, helper_coefficients: Tensor | None) -> None:
        """Put what a clustering found in place: the next version."""
        self.assignments.copy_(assignments)
        if self.helper_coefficients is not None:
            assert helper_coefficients is not None
            self.helper_coefficients.copy_(helper_coefficients)
        self.version += 1

    def main_rows(self, ids_N: Tensor) -> Tensor:
        """Row of each main codebook of each id, counted from that codebook's start: int64 [c * A, N]."""
        return self.assigned(ids_N).T.to(torch.int64)

    def assigned(self, ids_N: Tensor) -> Tensor:
        """The stored assignments of ids of this block: [N, c * A]."""
        local_N = ids_N - self.first_id if self.first_id else ids_N
        return torch.index_select(self.assignments, 0, local_N)  # twice as fast as indexing

    def helper_rows(self, ids_N: Tensor) -> Tensor:
        """Row of the helper codebook of each id, counted from its own start: int64 [c, N]."""
        assert self.helper_coefficients is not None
        return hash_rows(ids_N, self.helper_coefficients, self.num_helper_rows)

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.rows_of(ids_N, self.assigned(ids_N))

    def rows_of(self, ids_N: Tensor, assigned_NA: Tensor) -> Tensor:
        """:meth:`rows` of ids whose assignments [N, c * A] are known already."""
        columns, assigned = len(self.columns), self.num_assigned
        rows_CNR = torch.empty(columns, len(ids_N), self.rows_per_id, dtype=torch.int64, device=ids_N.device)
        rows_CNR[..., :assigned] = assigned_NA.view(-1, columns, assigned).transpose(0, 1)
        for level in range(1, assigned):
            rows_CNR[..., level] += level * self.level_rows
        if self.num_helper_rows:
            torch.add(self.helper_rows(ids_N), self.num_main_rows, out=rows_CNR[..., -1])
        return rows_CNR

    def source(self) -> RowSource | None:
        assignments, coefficients = self.assignments, self.helper_coefficients  # a buffer takes its time to find
        return RowSource(
            num_ids=len(assignments),
            first_id=self.first_id,
            assignments=assignments,
            num_stored=self.num_assigned,
            level_rows=self.level_rows,
            coefficients=coefficients,
            num_hashes=int(coefficients is not None),
            num_hashed_rows=self.num_helper_rows,
            hashed_from=self.num_main_rows,
        )

    def write_rows(self, ids_N: Tensor, values_M: Tensor, starts_C: Sequence[int | None]) -> bool:
        if self.num_assigned > 1 or self.helper_coefficients is None:
            return False
        return write_assigned_rows(
            ids_N,
            self.assignments,
            self.first_id,
            self.helper_coefficients,
            self.num_helper_rows,
            values_M,
            starts_C,
            hashed_from=self.num_main_rows,
        )


@dataclass(frozen=True, kw_only=True)
class CCE(RowMethod):
    """Clustered compositional embeddings: vector(id) = concat_i ( M_i[h_i(id)] + M'_i[h'_i(id)] ).

    ``h_i`` is a stored assignment (a hash until the first re-clustering), ``h'_i`` a hash function. :func:`recluster`
    replaces M_i by the K-means centroids of the ids' column vectors, h_i by the nearest centroid, h'_i by a fresh hash and
    M'_i by the mean residual of each of its rows, so that ids that behave alike come to share rows.

    Args:
        num_rows: k, rows of each column's main codebook.
        num_columns: c, columns; must divide the embedding dim. Each is ``embedding_dim / c`` wide.
        num_helper_rows: k', rows of each column's helper codebook; ``None`` for as many as the main one.
        seed: of the hash functions; the table's name is part of the seed.

    Stored beside the parameters: V x c assignments of 1, 2 or 4 bytes (the narrowest that holds k).

    Paper: Tsang & Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023, arXiv 2210.05974.
    There the helper starts at zero after a clustering; here at the mean residual, which loses less of what was learned.

    Example:
        >>> CCE(num_rows=100, num_columns=4).num_params(10_000, 16)
        3200
    """

    key: ClassVar[str] = "cce"
    reclusterable: ClassVar[bool] = True
    stores_assignments: ClassVar[bool] = True

    num_rows: int
    num_columns: int = 8
    num_helper_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows, num_helper_rows=self.helper_rows)
        check_positive(num_columns=self.num_columns)

    @property
    def helper_rows(self) -> int:
        """k', with the default filled in."""
        return self.num_rows if self.num_helper_rows is None else self.num_helper_rows

    def sizes(self) -> dict[str, Any]:
        return {**super().sizes(), "num_helper_rows": self.helper_rows}

    @property
    def num_assigned(self) -> int:
        """Codebooks of a column whose rows are stored for each id."""
        return 1

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        check_divides(embedding_dim, self.num_columns)
        return (self.num_assigned * self.num_rows + self.helper_rows) * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        return cls._split_evenly(1, embedding_dim, num_params, overrides)

    @classmethod
    def _split_evenly(
        cls, num_assigned: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        """The budget shared out equally to the codebooks of a column, as far as they are not fixed."""
        main_rows, helper_rows = overrides.get("num_rows"), overrides.get("num_helper_rows")
        smallest = num_assigned * (main_rows or 1) + (helper_rows or 1)
        rows = budget_rows(cls.key, num_params, embedding_dim, smallest)
        if main_rows is None:
            main_rows = (rows - (helper_rows or rows // (num_assigned + 1))) // num_assigned
        return {
            "num_rows": main_rows,
            "num_helper_rows": rows - num_assigned * main_rows,
            "num_columns": default_num_columns(embedding_dim, at_most=8),
        }

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        check_divides(embedding_dim, self.num_columns)
        codebooks = Codebooks(
            num_columns=self.num_columns,
            num_assigned=self.num_assigned,
            num_rows=self.num_rows,
            num_helper_rows=self.helper_rows,
        )
        return CCERowMap(codebooks, (self.seed, table, CCE.key), num_embeddings, embedding_dim, device)
