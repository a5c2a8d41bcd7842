"""CCE on circular memory: columns are windows of a flat memory, whose offsets are learned by re-clustering."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import (
    DecodeMethod,
    Decoder,
    TableSpec,
    check_divides,
    check_positive,
    default_num_columns,
    id_chunks,
)
from cce_torchrec.methods.encoding import smallest_int_dtype
from cce_torchrec.methods.flat_memory import (
    budget_cells,
    check_cells,
    check_window,
    fill_memory,
    new_memory,
    read_windows,
)


class CCERobeDecoder(Decoder):
    """Per column, a window of the main memory by stored offset plus a window of the helper memory by hashed offset.

    Parameters: ``memory`` [M] and ``helper`` [M']. Buffers: ``offsets`` [V, c] (where the main window of each column
    starts), ``helper_coefficients`` int64 [1 + c] and ``version`` (how many times it was re-clustered).
    """

    bounded = True
    offsets: Tensor
    helper_coefficients: Tensor
    version: Tensor

    def __init__(self, method: "CCERobe", table: TableSpec) -> None:
        super().__init__()
        columns, device = method.num_columns, table.device
        self.num_embeddings, self.num_columns = table.num_embeddings, columns
        self.width = table.embedding_dim // columns
        self._std, self._key = table.std, (method.seed, table.name, method.key)
        self.memory = new_memory(method.num_cells, table)
        self.helper = new_memory(method.helper_cells, table)
        dtype = smallest_int_dtype(method.num_cells)
        self.register_buffer("offsets", torch.empty(table.num_embeddings, columns, dtype=dtype, device=device))
        self.register_buffer("helper_coefficients", torch.empty(1 + columns, dtype=torch.int64, device=device))
        self.register_buffer("version", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill both memories and hash every id to offsets, the start before anything is learned."""
        for memory_M in (self.memory, self.helper):
            fill_memory(memory_M, self._std * 0.5**0.5)  # two of them are added
        self.version.zero_()
        self.helper_coefficients.copy_(self.draw_helper_coefficients(0))
        if self.offsets.device.type == "meta":
            return
        self._hash_from(0)

    def _hash_from(self, first_id: int) -> None:
        """Store the hashes of the ids from one on."""
        device = self.offsets.device
        coefficients = hash_coefficients(self.num_columns, *self._key, "main", device=device)
        for rows_N in id_chunks(self.num_embeddings - first_id, device):
            ids_N = rows_N + first_id
            self.offsets[ids_N[0] : ids_N[-1] + 1] = hash_rows(ids_N, coefficients, len(self.memory)).T

    @property
    def can_grow(self) -> bool:
        return True

    def grow(self, num_embeddings: int) -> None:
        before, self.num_embeddings = self.num_embeddings, num_embeddings
        more_NC = self.offsets.new_empty(num_embeddings - before, self.num_columns)
        self.offsets = torch.cat([self.offsets, more_NC])
        if self.offsets.device.type != "meta":
            self._hash_from(before)

    def draw_helper_coefficients(self, version: int, *key: object) -> Tensor:
        """The helper hash functions that go with a version of the offsets, on the CPU."""
        return hash_coefficients(self.num_columns, *self._key, "helper", version, *key)

    def main_offsets(self, ids_N: Tensor) -> Tensor:
        """Where each column's window of the main memory starts: int64 [N, c]."""
        return self.offsets.index_select(0, ids_N).to(torch.int64)

    def helper_offsets(self, ids_N: Tensor) -> Tensor:
        """Where each column's window of the helper memory starts: int64 [N, c]."""
        return hash_rows(ids_N, self.helper_coefficients, len(self.helper)).T

    def forward(self, ids_N: Tensor) -> Tensor:
        main_NCD = read_windows(self.memory, self.main_offsets(ids_N), self.width)
        helper_NCD = read_windows(self.helper, self.helper_offsets(ids_N), self.width)
        return (main_NCD + helper_NCD).flatten(1)


@dataclass(frozen=True, kw_only=True)
class CCERobe(DecodeMethod):
    """CCE whose codebooks are circular memories: column i of an id is the sum of two windows of w = D / c cells.

        vector(id) = concat_i ( window(h_i(id)) + window'(h'_i(id)) ),    window(o)_z = memory[(o + z) mod M]

    ``h_i`` is a stored offset (a hash until the first re-clustering), ``h'_i`` a hash function. :func:`recluster` fills
    the memory with the K-means centroids of all columns' vectors side by side (k = M div w of them), and assigns to
    every column of an id the nearest window at *any* offset; h'_i becomes a fresh hash, and a cell of the helper memory the
    mean of the residual's elements that read it. All columns share both memories.

    Args:
        num_cells: M, numbers in the main memory, below 2^30.
        num_columns: c, columns; must divide the embedding dim.
        num_helper_cells: M', numbers in the helper memory; ``None`` for as many as in the main one.
        seed: of the hash functions; the table's name is part of the seed.

    Stored beside the parameters: V x c offsets of 1, 2 or 4 bytes (the narrowest that holds M), on every rank.

    A re-clustering compares every column of every id with M windows, w times as many as it has centroids: V * c * M * w
    multiplications.

    Papers: Tsang & Ahle, "Clustering the Sketch", NeurIPS 2023, arXiv 2210.05974, and Desai, Chou & Shrivastava, "Random
    Offset Block Embedding Array (ROBE)", MLSys 2022, arXiv 2108.02191, for the memory. There codebooks and helpers are one
    array of the whole model in ROBE and tables in CCE; here each table has two arrays, so that a clustering can rewrite one
    and fit the other to what it leaves.

    Example:
        >>> CCERobe(num_cells=1000, num_columns=4).num_params(10_000, 16)
        2000
    """

    key: ClassVar[str] = "cce_robe"
    reclusterable: ClassVar[bool] = True

    num_cells: int
    num_columns: int = 8
    num_helper_cells: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_cells(num_cells=self.num_cells, num_helper_cells=self.helper_cells)
        check_positive(num_columns=self.num_columns)

    @property
    def helper_cells(self) -> int:
        """M', with the default filled in."""
        return self.num_cells if self.num_helper_cells is None else self.num_helper_cells

    def sizes(self) -> dict[str, Any]:
        return {**super().sizes(), "num_helper_cells": self.helper_cells}

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        check_divides(embedding_dim, self.num_columns)
        check_window(embedding_dim // self.num_columns, num_cells=self.num_cells, num_helper_cells=self.helper_cells)
        return self.num_cells + self.helper_cells

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        check_divides(embedding_dim, overrides.get("num_columns", 1))
        width = embedding_dim // overrides.get("num_columns", embedding_dim)  # at least
        main, helper = overrides.get("num_cells"), overrides.get("num_helper_cells")
        cells = budget_cells(cls.key, num_params, smallest=(main or width) + (helper or width))
        if helper is None:
            helper = cells // 2 if main is None else cells - main
        main = main or cells - helper
        columns = default_num_columns(embedding_dim, at_most=8)
        while embedding_dim % columns or embedding_dim // columns > min(main, helper):
            columns += 1
        return {"num_cells": main, "num_helper_cells": helper, "num_columns": columns}

    def decoder(self, table: TableSpec) -> Decoder:
        self.num_params(table.num_embeddings, table.embedding_dim)
        return CCERobeDecoder(self, table)
