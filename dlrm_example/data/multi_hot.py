"""Synthetic multi-hot features and tables of a given size, as MLPerf's DLRM-DCNv2 benchmark has them.

The benchmark's logs are one-hot. To an id, it adds others that are a function of that id: its table of V rows has `size`
columns, the id itself and `size - 1` random ones. Here a hash computes them, so nothing of the size of a table is held.
They follow the distributions of torchrec_dlrm's table, and are not its very numbers.

Shape suffixes: N ids, S ids that each becomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch

from dlrm_example.data.dataset import ColumnChoice
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import SparseColumn
from dlrm_example.data.vocabulary import hash_values, mix

Distribution = Literal["uniform", "pareto"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64
_PARETO_SHAPE = 0.25
_CHUNK_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """What the ids of a column look up: themselves modulo `num_embeddings`, and `size - 1` more ids each.

        uniform   id_j = u_j(id) mod V, with 64 random bits u_j
        pareto    id_j = floor((1 - u_j(id))^-4 - 1) mod V, with u_j in [0, 1): most are the first ids

    Args:
        column: its name, so that two columns draw others.
        num_embeddings: V, rows of the table.
        size: ids that each becomes.
    """

    column: str
    num_embeddings: int
    size: int = 1
    distribution: Distribution = "uniform"

    def of(self, ids_N: torch.Tensor) -> torch.Tensor:
        """`[N * size]` ids, those of one after those of the other."""
        kept_N = ids_N % self.num_embeddings
        if self.size == 1:
            return kept_N
        numbers_N = kept_N.numpy()
        ids_NS = np.empty((len(numbers_N), self.size), numbers_N.dtype)
        ids_NS[:, 0] = numbers_N
        ids_NS[:, 1:] = self._drawn(self._bits(numbers_N))
        return torch.from_numpy(ids_NS).reshape(-1)

    def counts(self, counts_V: np.ndarray) -> np.ndarray:
        """How often each row is looked up, where id v occurs `counts_V[v]` times."""
        found = np.zeros(self.num_embeddings)
        for start in range(0, len(counts_V), _CHUNK_IDS):
            part = counts_V[start : start + _CHUNK_IDS]
            ids = self.of(torch.arange(start, start + len(part)))
            found += np.bincount(ids.numpy(), np.repeat(part, self.size), minlength=self.num_embeddings)
        return found.astype(np.int64)

    def _bits(self, ids_N: np.ndarray) -> np.ndarray:
        """The first `size - 1` outputs of a splitmix64 generator that an id and the column seed."""
        states_N = mix(ids_N.astype(np.uint64) ^ hash_values(pa.array([self.column])))
        return mix(states_N[:, None] + np.arange(self.size - 1, dtype=np.uint64) * _STEP)

    def _drawn(self, bits: np.ndarray) -> np.ndarray:
        if self.distribution == "uniform":
            return bits % np.uint64(self.num_embeddings)
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.fmod(np.floor((1.0 - uniform) ** (-1.0 / _PARETO_SHAPE) - 1.0), self.num_embeddings)


def lookups_of(sparse: Sequence[SparseColumn], wanted: ColumnChoice) -> dict[str, Lookups]:
    """Of all columns where sizes are given, else of none.

    Raises:
        DataUnavailableError: not as many sizes as columns, or more than 1 for a column with several ids a row already.
    """
    if wanted.num_embeddings is None and wanted.multi_hot_sizes is None:
        return {}
    num_embeddings = wanted.num_embeddings or tuple(column.num_embeddings for column in sparse)
    sizes = wanted.multi_hot_sizes or (1,) * len(sparse)
    names = ", ".join(column.name for column in sparse)
    for flag, numbers in (("num_embeddings_per_feature", num_embeddings), ("multi_hot_sizes", sizes)):
        if len(numbers) != len(sparse):
            raise DataUnavailableError(f"--{flag} has {len(numbers)} numbers for {len(sparse)} sparse columns: {names}")
    for column, size in zip(sparse, sizes, strict=True):
        if column.multi_hot and size > 1:
            raise DataUnavailableError(
                f"--multi_hot_sizes: {column.name} is multi-hot already, so its size must be 1, not {size}"
            )
    return {
        column.name: Lookups(
            column=column.name, num_embeddings=rows, size=size, distribution=wanted.multi_hot_distribution
        )
        for column, rows, size in zip(sparse, num_embeddings, sizes, strict=True)
    }
