"""What a preparation reads: rows of one of the formats in parts, their columns, and the rule that splits them."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from dlrm_example.config import UsageError
from dlrm_example.data.criteo import text_to_parquet
from dlrm_example.data.encoding import is_list
from dlrm_example.data.prepare_config import PrepareConfig
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_LABEL, CRITEO_SPARSE, Part, npy_parts, parquet_parts
from dlrm_example.data.splits import ByFraction, ByRow, Splitter, by_last_day, by_time, moments_a_day
from dlrm_example.data.working import BadRows, rows_bar

KAGGLE_DAYS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """Rows in parts, and what to make of them."""

    parts: Sequence[Part]
    splitter: Splitter
    label: str
    dense: tuple[str, ...]
    sparse: dict[str, bool]
    transform: Any

    @property
    def columns(self) -> list[str]:
        time_column = [self.splitter.time_column] if self.splitter.time_column else []
        return list(dict.fromkeys([self.label, *self.dense, *self.sparse, *time_column]))

    def numbered(self) -> Iterator[tuple[int, Part, int]]:
        """Each part's number, the part, and the number of its first row."""
        firsts = accumulate((part.num_rows for part in self.parts), initial=0)
        return ((number, part, first) for number, (part, first) in enumerate(zip(self.parts, firsts, strict=False)))

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def open_input(config: PrepareConfig, files: Sequence[Path], work: Path, bad: BadRows) -> Input:
    if config.format == "parquet":
        return _open_parquet(config, files)
    by_file: Sequence[Sequence[Part]]
    if config.format == "criteo_npy":
        by_file, transform = npy_parts(config.input), "none"
    else:
        with rows_bar("text", None) as advance:
            made = text_to_parquet(files, work / "text", bad, config.workers, advance)
        by_file, transform = [parquet_parts(paths)[1] if paths else [] for paths in made], "log1p"
    lengths = [sum(part.num_rows for part in parts) for parts in by_file]
    if config.format == "criteo_kaggle" and len(lengths) > 1:
        raise UsageError(f"--format criteo_kaggle is one file, train.txt, but --input names {len(lengths)}")
    return Input(
        parts=[part for parts in by_file for part in parts],
        splitter=criteo_splitter(lengths),
        label=CRITEO_LABEL,
        dense=CRITEO_DENSE,
        sparse=dict.fromkeys(CRITEO_SPARSE, False),
        transform=config.dense_transform or transform,
    )


def criteo_splitter(rows_of_files: Sequence[int]) -> ByRow:
    """The last file is the last day, or the last seventh of one file; its first half is validation, the second the test."""
    total = sum(rows_of_files)
    last_day = rows_of_files[-1] if len(rows_of_files) > 1 else total // KAGGLE_DAYS
    return ByRow(total - last_day, total - last_day // 2)


def _open_parquet(config: PrepareConfig, files: Sequence[Path]) -> Input:
    assert config.label_column is not None, "checked by the config"
    wanted = [config.label_column, *config.dense_columns, *config.sparse_columns]
    wanted += [config.time_column] if config.time_column else []
    schema, parts = parquet_parts(files, wanted)
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        raise UsageError(f"no column named {', '.join(missing)} in --input; there are {', '.join(schema.names)}")
    return Input(
        parts=parts,
        splitter=_splitter(config, schema, parts),
        label=config.label_column,
        dense=config.dense_columns,
        sparse={name: is_list(schema.field(name).type) for name in config.sparse_columns},
        transform=config.dense_transform or "none",
    )


def _splitter(config: PrepareConfig, schema: pa.Schema, parts: Sequence[Part]) -> Splitter:
    if config.time_column is None:
        return ByFraction(config.val_fraction, config.test_fraction, config.seed)
    tables = (table for part in parts for table in part.read([str(config.time_column)]))
    if config.split == "time":
        return by_time(tables, config.time_column, config.val_fraction, config.test_fraction)
    day = moments_a_day(schema, config.time_column, config.time_unit)
    return by_last_day(tables, config.time_column, day, config.seed)
