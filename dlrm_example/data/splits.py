"""Which row is for training, which for validation, which for the test: by fractions, by time, or by the last day.

A splitter is asked part by part, in order, since some look at a row's number, counted from 0 over all the input.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_example.config import UsageError
from dlrm_example.data.vocabulary import ValueCounts, mix

TRAIN, VAL, TEST = 0, 1, 2  # places in `SPLITS`
TIME_UNITS = {"seconds": 86_400, "milliseconds": 86_400_000, "days": 1}  # so many a day


class Splitter(Protocol):
    """Says of each row which of `SPLITS` it belongs to; `time_column`, where there is one, must be in the rows."""

    @property
    def time_column(self) -> str | None: ...

    def assign(self, rows: pa.Table, first_row: int) -> np.ndarray:
        """int8, one a row."""
        ...


@dataclass(frozen=True)
class ByFraction:
    """At random, as a function of the seed and the row's number."""

    val: float
    test: float
    seed: int
    time_column: None = None

    def assign(self, rows: pa.Table, first_row: int) -> np.ndarray:
        numbers_N = np.arange(first_row, first_row + len(rows), dtype=np.uint64)
        seed = mix(np.array([self.seed], np.uint64))
        uniform_N = (mix(numbers_N ^ seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.where(uniform_N < self.test, TEST, np.where(uniform_N < self.test + self.val, VAL, TRAIN))


@dataclass(frozen=True)
class ByRow:
    """In order: training, then validation from row `val_start` on, then test from row `test_start` on."""

    val_start: int
    test_start: int
    time_column: None = None

    def assign(self, rows: pa.Table, first_row: int) -> np.ndarray:
        return self.split_of(np.arange(first_row, first_row + len(rows)))

    def split_of(self, numbers_N: np.ndarray) -> np.ndarray:
        """Of rows by their number."""
        return np.searchsorted([self.val_start, self.test_start], numbers_N, side="right")


@dataclass(frozen=True)
class ByTime:
    """Validation from a moment on, test from a later one on; rows of one moment stay together."""

    time_column: str
    val_start: int
    test_start: int

    def assign(self, rows: pa.Table, first_row: int) -> np.ndarray:
        return np.searchsorted([self.val_start, self.test_start], moments(rows, self.time_column), side="right")


@dataclass(frozen=True)
class ByLastDate:
    """The rows of the last day are validation or test, at random, where the time says no more than the day."""

    time_column: str
    last: int
    seed: int

    def assign(self, rows: pa.Table, first_row: int) -> np.ndarray:
        halves_N = ByFraction(0.5, 0.5, self.seed).assign(rows, first_row)
        return np.where(moments(rows, self.time_column) < self.last, TRAIN, halves_N)


def moments(rows: pa.Table, column: str) -> np.ndarray:
    """The time of each row as int64: microseconds of a timestamp, seconds or whatever it counts of a number.

    Raises:
        UsageError: the column is of another type, or has nulls.
    """
    values = rows[column]
    if values.null_count:
        raise UsageError(f"--time_column {column} has nulls, and such a row belongs to no split")
    kind = values.type
    if pa.types.is_timestamp(kind):
        values = values.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64())
    elif pa.types.is_date(kind):
        values = values.cast(pa.date32()).cast(pa.int32())
    elif not pa.types.is_integer(kind):
        raise UsageError(f"--time_column {column} is {kind}; it must be integers, dates or timestamps")
    return values.to_numpy().astype(np.int64)


def moments_a_day(schema: pa.Schema, column: str, unit_of_integers: str) -> int:
    """How many of `moments` a day has."""
    kind = schema.field(column).type
    if pa.types.is_timestamp(kind):
        return 86_400_000_000
    return 1 if pa.types.is_date(kind) else TIME_UNITS[unit_of_integers]


def by_time(tables: Iterable[pa.Table], column: str, val: float, test: float) -> ByTime:
    """The last `test` of the rows are the test, the `val` before them validation; holds the different moments."""
    times, counts = _counted(tables, column)
    from_the_end = np.cumsum(counts[::-1])[::-1]  # rows at each moment or later
    total = from_the_end[0]
    starts = [_first(times, from_the_end <= wanted) for wanted in ((val + test) * total, test * total)]
    return ByTime(column, *starts)


def by_last_day(tables: Iterable[pa.Table], column: str, moments_of_day: int, seed: int) -> ByTime | ByLastDate:
    """The last day's first half is validation, its second half the test, cut at a moment where it has several."""
    times, counts = _counted(tables, column)
    in_last_day = times // moments_of_day == times[-1] // moments_of_day
    day, rows = times[in_last_day], np.cumsum(counts[in_last_day])
    if len(day) == 1:
        return ByLastDate(column, int(day[0]), seed)
    return ByTime(column, int(day[0]), _first(day[1:], rows[:-1] * 2 >= rows[-1]))


def _first(times: np.ndarray, wanted: np.ndarray) -> int:
    return int(times[wanted][0]) if wanted.any() else int(times[-1]) + 1


def _counted(tables: Iterable[pa.Table], column: str) -> tuple[np.ndarray, np.ndarray]:
    counts = ValueCounts()
    for table in tables:
        counts.add(pa.array(moments(table, column)))
    table = counts.table().sort_by("value")
    if not len(table):
        raise UsageError("--input has no rows")
    return table["value"].to_numpy(), pc.cast(table["count"], pa.int64()).to_numpy()
