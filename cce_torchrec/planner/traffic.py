"""How often ids are looked up, table by table: from a dict, or from Parquet in one streaming pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torchrec.modules.embedding_configs import EmbeddingBagConfig

Statistics: TypeAlias = Mapping[str, Any] | str | Path
_MERGE_AT = 1 << 22  # ids that are collected before they are counted


@dataclass(frozen=True)
class Traffic:
    """How often a table is looked up, and how unevenly.

    Attributes:
        lookups: of all ids together, in the period that was counted.
        shares_U: the distinct shares of the lookups that an id may have, above 0, the largest first.
        numbers_U: how many ids have each; ids that were never looked up are in none.
    """

    lookups: float
    shares_U: np.ndarray
    numbers_U: np.ndarray

    @classmethod
    def even(cls, lookups: float, num_embeddings: int) -> "Traffic":
        """Every id as often as the others."""
        return cls(lookups, np.array([1 / num_embeddings]), np.array([float(num_embeddings)]))

    @classmethod
    def counted(cls, counts: np.ndarray) -> "Traffic":
        """From the lookups of each id, in any order."""
        distinct_U, numbers_U = np.unique(counts[counts > 0], return_counts=True)
        total = float(counts.sum())
        return cls(total, distinct_U[::-1] / total, numbers_U[::-1].astype(float))

    @cached_property
    def _up_to(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of the ids of each share or a larger one, and the lookups that they have together."""
        return np.cumsum(self.numbers_U), np.cumsum(self.shares_U * self.numbers_U)

    @cached_property
    def _known(self) -> dict[int, float]:
        return {}

    @property
    def total(self) -> float:
        """The sum of all shares: 1, or less after :meth:`without_first`."""
        return float(self.shares_U @ self.numbers_U)

    def share_of_first(self, num_ids: int) -> float:
        """The share of the lookups that the most looked up ids have."""
        ids_U, lookups_U = self._up_to
        place = int(np.searchsorted(ids_U, num_ids))
        if place == len(ids_U):
            return self.total
        return float(lookups_U[place] - (ids_U[place] - num_ids) * self.shares_U[place])

    def without_first(self, num_ids: int) -> "Traffic":
        """The others than the most looked up ids, whose shares stay those of all lookups."""
        ids_U, _ = self._up_to
        return replace(self, numbers_U=np.minimum(self.numbers_U, np.maximum(ids_U - num_ids, 0))) if num_ids else self

    def lost_to_hash(self, num_rows: int) -> float:
        """What ids lose by sharing rows with each other: sum_v p_v q_v / (p_v + q_v), see expected_loss.py."""
        if num_rows not in self._known:  # asked for again with every number of columns and of assigned ids
            others_U = np.maximum(self.total - self.shares_U, 0) / num_rows
            lost_U = self.shares_U * others_U / (self.shares_U + others_U)
            self._known[num_rows] = float(self.numbers_U @ lost_U)
        return self._known[num_rows]


def traffic_of(tables: Sequence[EmbeddingBagConfig], statistics: Statistics | None) -> dict[str, Traffic]:
    """The traffic of every table; see :func:`cce_torchrec.plan_compression` for what ``statistics`` may be.

    Raises:
        ValueError: where it lacks a table, names one that is not there, or does not fit its ids.
    """
    if statistics is None:
        return {table.name: Traffic.even(len(table.feature_names), table.num_embeddings) for table in tables}
    if isinstance(statistics, str | Path):
        return _from_parquet(tables, Path(statistics))
    if not isinstance(statistics, Mapping):
        raise ValueError(
            f"statistics={type(statistics).__name__} is neither lookups by table name nor the path of a Parquet directory."
        )
    names = [table.name for table in tables]
    unknown, missing = [n for n in statistics if n not in names], [n for n in names if n not in statistics]
    wrong = [f"{what} {keys}" for what, keys in (("names no tables,", unknown), ("lacks", missing)) if keys]
    if wrong:
        raise ValueError(
            f"statistics {' and '.join(wrong)}; the tables are {names}. Give the lookups of each, counted over the same "
            "examples."
        )
    return {table.name: _from_value(table, statistics[table.name]) for table in tables}


def _from_value(table: EmbeddingBagConfig, value: Any) -> Traffic:
    try:
        counts = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"statistics[{table.name!r}] is {type(value).__name__}, of which no numbers can be made: give one number of "
            "lookups, or one for each id."
        ) from None
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError(
            f"statistics[{table.name!r}] has values below 0 or that are not finite: give numbers of lookups."
        )
    if counts.ndim == 0:
        return Traffic.even(float(counts), table.num_embeddings)
    if counts.ndim != 1 or len(counts) > table.num_embeddings:
        raise ValueError(
            f"statistics[{table.name!r}] has shape {counts.shape} for {table.num_embeddings} ids: give the lookups of each "
            "id, of those that were seen, or one number for all."
        )
    if not counts.any():
        return Traffic.even(0.0, table.num_embeddings)
    return Traffic.counted(counts)


class _IdCounts:
    """Counts ids; memory follows the ids that were seen, not the table."""

    def __init__(self) -> None:
        self._ids, self._counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, ids: np.ndarray) -> None:
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        if self._num_waiting >= max(_MERGE_AT, len(self._ids)):
            self._merge()

    def _merge(self) -> None:
        new_ids, new_counts = np.unique(np.concatenate([self._ids[:0], *self._waiting]), return_counts=True)
        both = np.concatenate([self._ids, new_ids])
        self._ids, places = np.unique(both, return_inverse=True)
        counts = np.zeros(len(self._ids), dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self._counts, new_counts]))
        self._counts, self._waiting, self._num_waiting = counts, [], 0

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids that were seen, sorted, and how often."""
        self._merge()
        return self._ids, self._counts


def _from_parquet(tables: Sequence[EmbeddingBagConfig], path: Path) -> dict[str, Traffic]:
    """Count the columns that are named as the tables' features; integers or lists of them, batch by batch."""
    try:
        import pyarrow.dataset
        import pyarrow.types
    except ImportError:
        raise ValueError(f"statistics={str(path)!r} is read by pyarrow: pip install pyarrow, or pass a dict.") from None
    if not path.exists():
        raise ValueError(f"statistics={str(path)!r} does not exist: give a Parquet file or a directory of them.")
    data = pyarrow.dataset.dataset(path, format="parquet")
    if not data.files:
        raise ValueError(f"statistics={str(path)!r} is a directory without Parquet files: give one that has some.")
    wanted = list(dict.fromkeys(feature for table in tables for feature in table.feature_names))
    missing = [feature for feature in wanted if feature not in data.schema.names]
    if missing:
        raise ValueError(f"{path} has no columns {missing}, named as the features are; it has {data.schema.names}.")
    counts = {feature: _IdCounts() for feature in wanted}
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    for batch in data.to_batches(columns=wanted):
        for feature in wanted:
            values = batch.column(feature)
            while any(is_list(values.type) for is_list in lists):
                values = values.flatten()
            if not pyarrow.types.is_integer(values.type):
                raise ValueError(
                    f"Column {feature!r} of {path} has type {values.type}: ids are integers, or lists of them."
                )
            counts[feature].add(values.drop_null().to_numpy(zero_copy_only=False).astype(np.int64))
    seen = {feature: count.result() for feature, count in counts.items()}
    return {table.name: _of_features(table, [seen[feature] for feature in table.feature_names]) for table in tables}


def _of_features(table: EmbeddingBagConfig, seen: list[tuple[np.ndarray, np.ndarray]]) -> Traffic:
    """The traffic of a table from the counts of its features."""
    ids, places = np.unique(np.concatenate([ids for ids, _ in seen]), return_inverse=True)
    if len(ids) == 0:
        return Traffic.even(0.0, table.num_embeddings)
    if ids[0] < 0 or ids[-1] >= table.num_embeddings:
        raise ValueError(
            f"Table {table.name!r} has num_embeddings={table.num_embeddings}, but the data has ids from {ids[0]} to "
            f"{ids[-1]}: map them to 0 .. {table.num_embeddings - 1} first."
        )
    totals = np.zeros(len(ids), dtype=np.int64)
    np.add.at(totals, places, np.concatenate([counts for _, counts in seen]))
    return Traffic.counted(totals)
