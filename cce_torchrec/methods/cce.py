"""Clustered compositional embeddings (CCE): concatenated columns whose assignments are learned by re-clustering."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.assignments import AssignedRowMap, AssignmentStorage
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
from cce_torchrec.methods.blocks import Assignments
from cce_torchrec.native.rows import write_assigned_rows


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """What each column is made of: ``num_assigned`` codebooks by stored assignment, then one by hash.

    Attributes:
        num_columns: c.
        num_assigned: A, codebooks whose rows are stored for each id.
        num_rows: k, rows of each of those.
        num_helper_rows: k', rows of the hashed one; 0 for none.
        storage: of the assignments; hot ids have a row of their own in every column.
    """

    num_columns: int
    num_assigned: int
    num_rows: int
    num_helper_rows: int
    storage: AssignmentStorage


class CCERowMap(AssignedRowMap):
    """Main rows by stored assignment, a helper row by hash. A column's table has A * k main, then hot, then helper rows.

    The c * A assignments of an id are the rows of the main codebooks, column by column. The rows of a hot id are its own,
    ``rows_per_id`` times the same. Buffers beside the assignments: ``helper_coefficients`` int64 [1 + c] and ``version``
    (how many times it was re-clustered).
    """

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
        columns, assigned = codebooks.num_columns, codebooks.num_assigned
        super().__init__(codebooks.storage, codebooks.num_rows, columns * assigned, key, num_embeddings, device)
        self.num_assigned, self.level_rows = assigned, codebooks.num_rows
        self.num_main_rows, self.num_helper_rows = assigned * codebooks.num_rows, codebooks.num_helper_rows
        self.first_helper_row = self.num_main_rows + codebooks.storage.num_hot_ids
        self.rows_per_id = assigned + (self.num_helper_rows > 0)
        self.columns = (Column(self.first_helper_row + self.num_helper_rows, embedding_dim // columns),) * columns
        helper = torch.empty(1 + columns, dtype=torch.int64, device=device) if self.num_helper_rows else None
        self.register_buffer("helper_coefficients", helper)
        self.register_buffer("version", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hash every id to main rows, the start before anything is learned."""
        self.version.zero_()
        if self.helper_coefficients is not None:
            self.helper_coefficients.copy_(self.draw_helper_coefficients(0))
        self.reset_assignments()

    def draw_helper_coefficients(self, version: int, *key: object) -> Tensor:
        """The helper hash functions that go with a version of the assignments, on the CPU."""
        return hash_coefficients(len(self.columns), *self._key, "helper", version, *key)

    def replace(self, stored_NW: Tensor, ids_N: Tensor | None, helper_coefficients: Tensor | None) -> None:
        """Put what a clustering found in place: the next version.

        Args:
            stored_NW: new assignments, encoded.
            ids_N: whose they are; ``None`` for all ids of this rank.
            helper_coefficients: fresh helper hashes.
        """
        self.put(stored_NW, ids_N)
        self.share_cold_row()
        if self.helper_coefficients is not None:
            assert helper_coefficients is not None
            self.helper_coefficients.copy_(helper_coefficients)
        self.version += 1

    def main_rows(self, ids_N: Tensor) -> Tensor:
        """Row of each main codebook of each id, counted from that codebook's start, of hot ids k and up: int64 [c * A, N]."""
        return self.assigned(ids_N).T.to(torch.int64)

    def helper_rows(self, ids_N: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Row of the helper codebook of each id, by these hash functions or others, from its own start: int64 [c, N]."""
        coefficients = self.helper_coefficients if coefficients is None else coefficients
        assert coefficients is not None
        return hash_rows(ids_N, coefficients, self.num_helper_rows)

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.rows_of(ids_N, self.assigned(ids_N))

    def rows_of(self, ids_N: Tensor, assigned_NA: Tensor, helper_coefficients: Tensor | None = None) -> Tensor:
        """:meth:`rows` of ids with assignments [N, c * A] that are known already, or others, as may be the helper hashes."""
        columns, assigned = len(self.columns), self.num_assigned
        rows_CNR = torch.empty(columns, len(ids_N), self.rows_per_id, dtype=torch.int64, device=ids_N.device)
        rows_CNR[..., :assigned] = assigned_NA.view(-1, columns, assigned).transpose(0, 1)
        for level in range(1, assigned):
            rows_CNR[..., level] += level * self.level_rows
        if self.num_helper_rows:
            torch.add(self.helper_rows(ids_N, helper_coefficients), self.first_helper_row, out=rows_CNR[..., -1])
        if self.storage.num_hot_ids:
            self._point_to_own(rows_CNR)
        return rows_CNR

    def _point_to_own(self, rows_CNR: Tensor) -> None:
        """Replace all rows of hot ids, whose assignments are k and up, by their own."""
        is_hot_N = rows_CNR[0, :, 0] >= self.level_rows
        own_N = rows_CNR[0, :, 0] + (self.num_main_rows - self.level_rows)
        torch.where(is_hot_N[:, None], own_N[:, None], rows_CNR, out=rows_CNR)

    def source(self) -> RowSource | None:
        has_hot_ids = self.storage.num_hot_ids > 0
        if not self.has_plain_assignments or (has_hot_ids and self.num_assigned > 1):
            return None
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
            hashed_from=self.first_helper_row,
            hot_from=self.level_rows if has_hot_ids else None,
        )

    def write_rows(self, ids_N: Tensor, values_M: Tensor, starts_C: Sequence[int | None]) -> bool:
        if self.num_assigned > 1 or self.helper_coefficients is None:
            return False
        return write_assigned_rows(
            ids_N,
            self.assigned_here(),
            self.helper_coefficients,
            self.num_helper_rows,
            values_M,
            starts_C,
            hashed_from=self.first_helper_row,
            hot_from=self.level_rows if self.storage.num_hot_ids else None,
        )


@dataclass(frozen=True, kw_only=True)
class CCE(RowMethod):
    """Clustered compositional embeddings: vector(id) = concat_i ( M_i[h_i(id)] + M'_i[h'_i(id)] ).

    ``h_i`` is a stored assignment (a block of ids until the first re-clustering), ``h'_i`` a hash function. :func:`recluster`
    replaces M_i by the K-means centroids of the ids' column vectors, h_i by the nearest centroid, h'_i by a fresh hash and
    M'_i by the mean residual of each of its rows, so that ids that behave alike come to share rows. Hot ids share none: their
    vector is 2 H[j], the j-th of H a row of their own.

    Args:
        num_rows: k, rows of each column's main codebook.
        num_columns: c, columns; must divide the embedding dim. Each is ``embedding_dim / c`` wide.
        num_helper_rows: k', rows of each column's helper codebook; ``None`` for as many as the main one.
        seed: of the hash functions; the table's name is part of the seed.
        bit_packed: whether assignments take ceil(log2 k) bits instead of 1, 2 or 4 bytes; results are the same.
        num_assigned_ids: N, how many ids have stored assignments; ``None`` for all. Each re-clustering gives them to the ids
            seen most often in training (or of the largest ``id_weights``). The others are hashed until the first one; from
            then on they share a row of each main codebook, the mean of their vectors, and differ by their helper rows.
        min_id_count: n, how often an id must have been seen to get stored assignments, where not all ids have them.
        num_hot_ids: f, how many ids have a row of their own. Each re-clustering gives these to the ids on which the loss
            depends most, by the gradients that were recorded, or to those of the largest weights, where weights are given.
            Without either, and until the first re-clustering, the first ids have them.
        initial_assignments: what ids are assigned until the first re-clustering. "blocks": about V / k consecutive ids share
            a row, in each column others, so neighbours share most; that is as good as a hash where ids are numbered at
            random, and much better where neighbours are alike. "hash": a hash, as in the paper. Where not all ids have
            stored assignments, they begin with hashes.

    Stored beside the parameters: V x c assignments of 1, 2 or 4 bytes (the narrowest that holds k + f), or of the bits that
    k + f takes, filled up to a byte an id. With ``num_assigned_ids``: N instead of V, and 4 bytes for each of those ids.

    Paper: Tsang & Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023, arXiv 2210.05974.
    There ids begin with hashes, and the helper starts at zero after a clustering; here at the mean residual, which loses
    less of what was learned.
    Rows of their own for frequent ids: Zhang et al., "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale
    Recommendation Models", SIGMOD 2024, arXiv 2312.03256.

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
    bit_packed: bool = False
    num_assigned_ids: int | None = None
    min_id_count: int = 1
    num_hot_ids: int = 0
    initial_assignments: Assignments = "blocks"

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows, num_helper_rows=self.helper_rows)
        check_positive(num_columns=self.num_columns)
        check_rows(num_rows_with_those_of_hot_ids=self.num_rows + self.storage.num_hot_ids)

    @property
    def helper_rows(self) -> int:
        """k', with the default filled in."""
        return self.num_rows if self.num_helper_rows is None else self.num_helper_rows

    def sizes(self) -> dict[str, Any]:
        stored = ("bit_packed", "num_assigned_ids", "min_id_count", "num_hot_ids", "initial_assignments")
        sizes = {name: value for name, value in super().sizes().items() if name not in stored}
        return {**sizes, "num_helper_rows": self.helper_rows, **self.storage.sizes()}

    @property
    def storage(self) -> AssignmentStorage:
        """Of the assignments."""
        return AssignmentStorage(
            initial=self.initial_assignments,
            bit_packed=self.bit_packed,
            num_assigned_ids=self.num_assigned_ids,
            min_id_count=self.min_id_count,
            num_hot_ids=self.num_hot_ids,
        )

    @property
    def counts_ids(self) -> bool:
        return self.num_assigned_ids is not None

    @property
    def num_assigned(self) -> int:
        """Codebooks of a column whose rows are stored for each id."""
        return 1

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        check_divides(embedding_dim, self.num_columns)
        return (self.num_assigned * self.num_rows + self.num_hot_ids + self.helper_rows) * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        return cls._split_evenly(1, embedding_dim, num_params, overrides)

    @classmethod
    def _split_evenly(
        cls, num_assigned: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        """The budget without hot ids shared out equally to the codebooks of a column, as far as they are not fixed."""
        main_rows, helper_rows = overrides.get("num_rows"), overrides.get("num_helper_rows")
        hot_ids = overrides.get("num_hot_ids", 0)
        smallest = num_assigned * (main_rows or 1) + (helper_rows or 1) + hot_ids
        rows = budget_rows(cls.key, num_params, embedding_dim, smallest) - hot_ids
        if main_rows is None:
            main_rows = (rows - (helper_rows or rows // (num_assigned + 1))) // num_assigned
            warm_ids = overrides.get("num_assigned_ids")
            main_rows = main_rows if warm_ids is None else min(main_rows, warm_ids + 1)  # more have no id to cluster
        return {
            "num_rows": main_rows,
            "num_helper_rows": rows - num_assigned * main_rows,
            "num_columns": default_num_columns(embedding_dim, at_most=cls.num_columns),
        }

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        check_divides(embedding_dim, self.num_columns)
        codebooks = Codebooks(
            num_columns=self.num_columns,
            num_assigned=self.num_assigned,
            num_rows=self.num_rows,
            num_helper_rows=self.helper_rows,
            storage=self.storage,
        )
        return CCERowMap(codebooks, (self.seed, table, CCE.key), num_embeddings, embedding_dim, device)
