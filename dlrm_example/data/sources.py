"""Where raw rows come from, cut into parts: Parquet files of any layout, or torchrec_dlrm's preprocessed `.npy` days."""

import glob
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from dlrm_example.data.encoding import is_list
from dlrm_example.errors import UsageError

PART_ROWS = 1 << 18  # about as many a part, which is what a resumed preparation skips
CHUNK_ROWS = 1 << 16  # at most as many in memory at once
CRITEO_LABEL = "label"
CRITEO_DENSE = tuple(f"int_{number}" for number in range(13))
CRITEO_SPARSE = tuple(f"cat_{number}" for number in range(26))


class Part(Protocol):
    """Some consecutive rows of the input."""

    @property
    def num_rows(self) -> int: ...

    def read(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows in order, at most `CHUNK_ROWS` at a time."""
        ...


@dataclass(frozen=True)
class ParquetPart:
    """Some row groups of one or more files."""

    fragments: tuple[Any, ...]
    schema: pa.Schema
    num_rows: int

    def read(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for fragment in self.fragments:
            batches = fragment.to_batches(
                self.schema, columns=list(columns), batch_size=CHUNK_ROWS, batch_readahead=1, use_threads=False
            )
            for batch in batches:
                if len(batch):
                    yield pa.Table.from_batches([batch])


def find_files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that paths, folders (with all below them) and globs name, in the order of the inputs, else sorted.

    Raises:
        UsageError: an input names none.
    """
    found: dict[Path, None] = {}
    for pattern in inputs:
        paths = (
            [Path(pattern)] if Path(pattern).exists() else [Path(path) for path in glob.glob(pattern, recursive=True)]
        )
        files: list[Path] = []
        for path in sorted(paths, key=_natural):
            files += _below(path, suffixes) if path.is_dir() else [path]
        if not files:
            raise UsageError(
                f"--input {pattern} names no file{' or folder of ' + ', '.join(suffixes) if suffixes else ''}"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def _below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes)]
    hidden = (".", "_")
    shown = [path for path in files if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]
    return sorted(shown, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """`day_2` before `day_10`."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", str(path))]


def parquet_parts(files: Sequence[Path], wanted: Collection[str] = ()) -> tuple[pa.Schema, list[ParquetPart]]:
    """The common schema, hive partitions (`day=3/`) being columns too, and the rows in parts.

    Raises:
        UsageError: a file cannot be read, or a wanted column has types in different files that have none in common.
    """
    try:
        dataset = pads.dataset([str(file) for file in files], format="parquet", partitioning="hive")
        fragments = list(dataset.get_fragments())
        schema = _common_schema(dataset.schema, fragments, wanted)
        pieces = [piece for fragment in fragments for piece in fragment.split_by_row_group()]
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"--input: {error}") from None
    parts, waiting, rows = [], [], 0
    for piece in pieces:
        waiting.append(piece)
        rows += sum(group.num_rows for group in piece.row_groups)
        if rows >= PART_ROWS:
            parts.append(ParquetPart(tuple(waiting), schema, rows))
            waiting, rows = [], 0
    if waiting:
        parts.append(ParquetPart(tuple(waiting), schema, rows))
    return schema, parts


def _common_schema(first: pa.Schema, fragments: Sequence[Any], wanted: Collection[str]) -> pa.Schema:
    """Each column with the first type that holds those of all files: the types of the first file alone would not do."""
    found: dict[str, dict[pa.DataType, str]] = {field.name: {} for field in first}
    for fragment in fragments:
        for field in fragment.physical_schema:
            found.setdefault(field.name, {}).setdefault(field.type, fragment.path)
    fields = []
    for name, files_by_type in found.items():
        kinds = list(files_by_type) or [first.field(name).type]  # a hive partition is in no file
        try:
            fields.append(pa.field(name, _common_type(kinds)))
        except pa.ArrowTypeError:
            if name in wanted:
                described = ", ".join(f"{kind} in {file}" for kind, file in files_by_type.items())
                raise UsageError(f"--input: column {name} is {described}, which have no type in common") from None
            fields.append(pa.field(name, kinds[0]))
    return pa.schema(fields)


def _common_type(kinds: Sequence[pa.DataType]) -> pa.DataType:
    plain = [_plain(kind) for kind in kinds] if len(kinds) > 1 or pa.types.is_string_view(kinds[0]) else kinds
    schemas = [pa.schema([("column", kind)]) for kind in plain]
    return pa.unify_schemas(schemas, promote_options="permissive").field("column").type


def _plain(kind: pa.DataType) -> pa.DataType:
    """Dictionaries are as good as their values, lists as others; string views cannot be filtered."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if is_list(kind):
        return pa.large_list(_plain(kind.value_type))
    return pa.string() if pa.types.is_string_view(kind) else kind


@dataclass(frozen=True)
class NpyPart:
    """Some rows of a day that torchrec_dlrm's scripts wrote: `day_N_{dense,sparse,labels}.npy`."""

    stem: str
    start: int
    num_rows: int

    def read(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        dense, sparse, labels = (np.load(f"{self.stem}_{kind}.npy", mmap_mode="r") for kind in NPY_KINDS)
        for start in range(self.start, self.start + self.num_rows, CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, self.start + self.num_rows))
            arrays = {CRITEO_LABEL: labels.reshape(-1)[rows]}
            arrays |= {name: dense[rows, number] for number, name in enumerate(CRITEO_DENSE)}
            arrays |= {name: sparse[rows, number] for number, name in enumerate(CRITEO_SPARSE)}
            yield pa.table({name: pa.array(np.ascontiguousarray(arrays[name])) for name in columns})


NPY_KINDS = ("dense", "sparse", "labels")


def npy_parts(inputs: Sequence[str]) -> list[list[NpyPart]]:
    """The parts of each day, in the order of the days.

    Raises:
        UsageError: there are none, a file of a day is missing, or their shapes do not fit.
    """
    stems = [str(file).removesuffix("_dense.npy") for file in find_files(inputs, ("_dense.npy",))]
    return [_npy_day(stem) for stem in stems]


def _npy_day(stem: str) -> list[NpyPart]:
    try:
        dense, sparse, labels = (np.load(f"{stem}_{kind}.npy", mmap_mode="r") for kind in NPY_KINDS)
    except (OSError, ValueError) as error:
        raise UsageError(f"--input: {error}") from None
    rows = len(dense)
    if dense.shape != (rows, 13) or sparse.shape != (rows, 26) or labels.size != rows:
        shapes = f"{dense.shape}, {sparse.shape} and {labels.shape}"
        raise UsageError(f"--input: {stem}_*.npy have shapes {shapes}, not ({rows}, 13), ({rows}, 26) and ({rows}, 1)")
    return [NpyPart(stem, start, min(PART_ROWS, rows - start)) for start in range(0, rows, PART_ROWS)]
