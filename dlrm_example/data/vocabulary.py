"""From a column's values to contiguous ids: by a vocabulary of the frequent values, or by hashing into buckets.

Both count first, over the training rows, a chunk at a time; what they hold is of the size of the vocabulary.

Shape suffixes: N values of a chunk, U different values, V ids of the table.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_example.data.manifest import FIRST_ID, MISSING, UNKNOWN

BUFFERED_VALUES = 1 << 17  # different values that wait to be merged, at least
_P = np.uint64(0x9E3779B97F4A7C15)


class Encoder(Protocol):
    """Turns values of one column into ids in `[0, num_embeddings)`; nulls are id `MISSING`."""

    @property
    def num_embeddings(self) -> int: ...

    def encode(self, values: pa.Array) -> np.ndarray:
        """int32 ids, one a value."""
        ...


class Counter(Protocol):
    """Sees all training values of one column."""

    def add(self, values: pa.Array) -> None: ...

    def result(self) -> tuple[pa.Array | None, np.ndarray]:
        """The values from id `FIRST_ID` on, if ids have values, and how often each id occurs."""
        ...


@dataclass
class ValueCounts:
    """How often each value occurs. New ones wait in a buffer until it is half as large as what is there already."""

    _merged: pa.Table | None = None
    _waiting: list[pa.Table] = field(default_factory=list)
    nulls: int = 0

    def add(self, values: pa.Array) -> None:
        self.nulls += values.null_count
        counted = values.drop_null().value_counts()
        self._waiting.append(pa.table({"value": counted.field("values"), "count": counted.field("counts")}))
        if sum(map(len, self._waiting)) > max(BUFFERED_VALUES, len(self._merged or []) // 2):
            self._merge()

    def _merge(self) -> None:
        tables = [*([self._merged] if self._merged is not None else []), *self._waiting]
        merged = pa.concat_tables(tables).group_by("value", use_threads=False).aggregate([("count", "sum")])
        self._merged, self._waiting = merged.rename_columns(["value", "count"]), []

    def table(self) -> pa.Table:
        """`value` and `count`, the most frequent first; among equals the smaller value."""
        self._merge()
        assert self._merged is not None
        return self._merged.sort_by([("count", "descending"), ("value", "ascending")]).combine_chunks()


@dataclass
class VocabularyCounter:
    """Gives an id to every value that occurs `min_count` times or more in the training rows."""

    min_count: int
    counts: ValueCounts = field(default_factory=ValueCounts)

    def add(self, values: pa.Array) -> None:
        self.counts.add(values)

    def result(self) -> tuple[pa.Array, np.ndarray]:
        table = self.counts.table()
        num_kept = int(pc.sum(pc.greater_equal(table["count"], self.min_count)).as_py() or 0)
        kept = table.slice(0, num_kept)
        rare = int(pc.sum(table["count"].slice(num_kept)).as_py() or 0)
        counts_V = np.concatenate([[self.counts.nulls, rare], kept["count"].to_numpy()]).astype(np.int64)
        return pa.concat_arrays(kept["value"].chunks or [pa.array([], table["value"].type)]), counts_V


class Vocabulary:
    """Value j of the vocabulary is id j + `FIRST_ID`; any other is `UNKNOWN`."""

    def __init__(self, values: pa.Array) -> None:
        self.num_embeddings = FIRST_ID + len(values)
        self._texts = values
        self._numbers: np.ndarray | None = None
        if pa.types.is_integer(values.type):  # a sorted array takes less memory than a hash table, and no time to build
            numbers = values.to_numpy()
            order = np.argsort(numbers)
            self._numbers, self._ids = numbers[order], (order + FIRST_ID).astype(np.int32)
            self._texts = None

    def encode(self, values: pa.Array) -> np.ndarray:
        coded = values.dictionary_encode()
        codes_N = coded.indices.fill_null(len(coded.dictionary)).to_numpy(zero_copy_only=False)
        return np.append(self._ids_of(coded.dictionary), np.int32(MISSING))[codes_N]

    def _ids_of(self, different: pa.Array) -> np.ndarray:
        if self._numbers is None:
            found = pc.index_in(different, value_set=self._texts)
            return (found.fill_null(UNKNOWN - FIRST_ID).to_numpy(zero_copy_only=False) + FIRST_ID).astype(np.int32)
        numbers_U = different.to_numpy()
        if not len(self._numbers):
            return np.full(len(numbers_U), UNKNOWN, np.int32)
        places_U = np.minimum(np.searchsorted(self._numbers, numbers_U), len(self._numbers) - 1)
        return np.where(self._numbers[places_U] == numbers_U, self._ids[places_U], np.int32(UNKNOWN))


@dataclass
class Hashed:
    """Hashes a value into one of `num_embeddings - 1` ids; the first id is that of nulls. Counts and encodes."""

    num_embeddings: int
    _counts_V: np.ndarray | int = 0

    def add(self, values: pa.Array) -> None:
        self._counts_V = self._counts_V + np.bincount(self.encode(values), minlength=self.num_embeddings)

    def result(self) -> tuple[None, np.ndarray]:
        return None, np.zeros(self.num_embeddings, np.int64) + self._counts_V

    def encode(self, values: pa.Array) -> np.ndarray:
        ids_N = 1 + hash_values(values) % np.uint64(self.num_embeddings - 1)
        ids_N[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
        return ids_N.astype(np.int32)


def hash_values(values: pa.Array) -> np.ndarray:
    """64 well-mixed bits a value: of an integer itself, of a text as a polynomial in its bytes; stable for ever."""
    if pa.types.is_integer(values.type):
        return mix(values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64))
    return mix(_polynomials(values.cast(pa.large_binary()).fill_null(b"")))


def _polynomials(texts: pa.Array) -> np.ndarray:
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths_N = np.diff(offsets)
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]] if data_buffer else np.zeros(0, np.uint8)
    starts_N = offsets[:-1] - offsets[0]
    powers = np.cumprod(np.full(max(int(lengths_N.max(initial=0)), 1), _P))
    terms = (data.astype(np.uint64) + np.uint64(1)) * powers[np.arange(len(data)) - np.repeat(starts_N, lengths_N)]
    sums_N = np.zeros(len(texts), np.uint64)
    if len(data):
        filled = lengths_N > 0
        sums_N[filled] = np.add.reduceat(terms, starts_N[filled])
    return sums_N + lengths_N.astype(np.uint64)


def mix(bits: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = bits + _P
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def plain(values: Any, max_ind_range: int | None) -> pa.Array:
    """Values as int64 or large_string, dictionaries decoded; integers modulo `max_ind_range` where it is given.

    A uint64 of 2^63 or more, such as a hash, is the int64 of the same bits.

    Raises:
        ValueError: the column is of another type.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        numbers = values if pa.types.is_uint64(kind) else values.cast(pa.int64())
        if max_ind_range is None:
            return numbers.view(pa.int64())
        present = numbers.is_valid().to_numpy(zero_copy_only=False)
        remainders = numbers.fill_null(0).to_numpy(zero_copy_only=False) % max_ind_range
        return pa.array(remainders.astype(np.int64), mask=~present)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.cast(pa.large_string())
    raise ValueError(
        f"ids are {kind}; they must be integers, booleans, strings or dictionaries of those, or lists of them"
    )
