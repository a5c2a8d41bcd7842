"""Make click logs like Criteo's, of any size: `python -m dlrm_example.data.generate --out logs --rows 10000000 --days 7`.

`truth.json`, beside them, holds the truth's settings and the least log loss that a model can have on them, which is known
because the clicks are drawn by `truth.py`: of each file, and of the splits that `prepare` makes of them.
"""

import argparse
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from dlrm_example.config import UsageError
from dlrm_example.console import set_up_logging
from dlrm_example.data.dataset import SPLITS
from dlrm_example.data.inputs import criteo_splitter
from dlrm_example.data.prepare_config import PrepareConfig
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_LABEL, CRITEO_SPARSE
from dlrm_example.data.truth import ABSENT, Draw, Truth, entropy, log_loss
from dlrm_example.data.working import in_order, rows_bar
from dlrm_example.records import write_json

logger = logging.getLogger("dlrm_example.data.generate")

CHUNK_ROWS = 1 << 16
FORMATS = ("tsv", "tsv.gz", "parquet")
TRUTH = "truth.json"
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """0, 2 for flags that cannot be, or 1 for files that cannot be written."""
    set_up_logging()
    settings = vars(_parser().parse_args(argv))
    files = {name: settings.pop(name) for name in ("out", "rows", "days", "format", "overwrite")}
    try:
        generate(Truth(**settings), **files)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {files['out']} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def generate(truth: Truth, out: str, *, rows: int, days: int, format: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the logs; returns what `truth.json` says.

    Raises:
        UsageError: a setting cannot be, or `out` exists.
    """
    if not 1 <= days <= rows:
        raise UsageError(f"--days is {days}; it must be from 1 to --rows {rows}")
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is unknown; there are {', '.join(FORMATS)}")
    folder = Path(out)
    if folder.exists() and not (overwrite and (folder / TRUTH).exists()):
        raise UsageError(f"--out {folder} exists: give another folder, or --overwrite if it holds generated logs")
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lengths = [rows * (day + 1) // days - rows * day // days for day in range(days)]
    losses = _Losses(lengths)
    with rows_bar("generating", rows) as advance, ThreadPoolExecutor(PrepareConfig.workers) as pool:
        first_chunk = first_row = 0
        for day, length in enumerate(lengths):
            sizes = [min(CHUNK_ROWS, length - start) for start in range(0, length, CHUNK_ROWS)]
            jobs = (partial(_chunk, truth, size, first_chunk + number) for number, size in enumerate(sizes))
            with _writer(work, day, days, format) as write:
                for draw, table in in_order(pool, jobs, 2 * PrepareConfig.workers):
                    write(table)
                    losses.add(draw, day, first_row)
                    first_row += len(table)
                    advance(len(table))
            first_chunk += len(sizes)
    content = {"truth": dataclasses.asdict(truth), "rows": rows, "days": days, "format": format, **losses.summary()}
    write_json(work / TRUTH, content)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    logger.info("%s: %d rows; no model has an expected log loss below %.5f", folder, rows, content["bayes_log_loss"])
    return content


class _Losses:
    """Mean entropies and the truth's own log losses, of all rows, of each file, and of the splits of `prepare`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._splitter = criteo_splitter(lengths)
        self._sums: dict[str, np.ndarray] = {}
        self._days = len(lengths)

    def add(self, draw: Draw, day: int, first_row: int) -> None:
        entropy_N, loss_N = entropy(draw.probability_N), log_loss(draw.probability_N, draw.labels_N)
        splits_N = self._splitter.split_of(np.arange(first_row, first_row + len(entropy_N)))
        groups = {"all": slice(None), f"file {day}": slice(None)}
        for name, rows in [*groups.items(), *((split, splits_N == place) for place, split in enumerate(SPLITS))]:
            found = np.array([len(entropy_N[rows]), entropy_N[rows].sum(), loss_N[rows].sum()])
            self._sums[name] = self._sums.get(name, 0.0) + found

    def summary(self) -> dict[str, Any]:
        means = {
            name: {"rows": int(rows), "bayes_log_loss": entropies / rows, "log_loss_of_truth": losses / rows}
            for name, (rows, entropies, losses) in self._sums.items()
            if rows
        }
        files = [means[f"file {day}"] for day in range(self._days)]
        return {**means["all"], "files": files, "splits": {split: means[split] for split in SPLITS if split in means}}


def _chunk(truth: Truth, size: int, number: int) -> tuple[Draw, pa.Table]:
    draw = truth.draw(size, number)
    columns = {CRITEO_LABEL: pa.array(draw.labels_N)}
    for names, values in ((CRITEO_DENSE, draw.dense_ND), (CRITEO_SPARSE, draw.ids_NF)):
        for column, name in enumerate(names):
            absent_N = values[:, column] == ABSENT
            numbers_N = spread(values[:, column], column) if names is CRITEO_SPARSE else values[:, column]
            columns[name] = pa.array(numbers_N, mask=absent_N)
    return draw, pa.table(columns)


def spread(ids_N: np.ndarray, column: int) -> np.ndarray:
    """32 bits that look like a hash but are another for every id of a column (murmur3's finaliser is a bijection)."""
    bits = ids_N.astype(np.uint32) + np.uint32(column * 0x9E3779B1 % 2**32)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


@contextmanager
def _writer(work: Path, day: int, days: int, format: str) -> Iterator[Any]:
    """Appends tables to a day's file: `day_N[.gz]`, or `train.txt[.gz]` of one day only, or `day=N/rows.parquet`."""
    if format == "parquet":
        (work / f"day={day}").mkdir()
        schema = pa.schema(
            [
                (CRITEO_LABEL, pa.int8()),
                *((name, pa.int64()) for name in CRITEO_DENSE),
                *((name, pa.uint32()) for name in CRITEO_SPARSE),
            ]
        )
        with pq.ParquetWriter(work / f"day={day}" / "rows.parquet", schema) as parquet:
            yield parquet.write_table
        return
    name = ("train.txt" if days == 1 else f"day_{day}") + (".gz" if format == "tsv.gz" else "")
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with pa.output_stream(str(work / name)) as stream:  # the name's ending says whether it is compressed
        yield lambda table: csv.write_csv(_as_text(table), stream, options)


def _as_text(table: pa.Table) -> pa.Table:
    return pa.table(
        {name: hexadecimal(table[name]) if name in CRITEO_SPARSE else table[name] for name in table.column_names}
    )


def hexadecimal(numbers: pa.ChunkedArray) -> pa.Array:
    """Eight lower-case digits each."""
    plain = numbers.combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
    bytes_N4 = plain.astype(">u4").view(np.uint8).reshape(-1, 4)
    digits_N8 = np.empty((len(bytes_N4), 8), np.uint8)
    digits_N8[:, 0::2], digits_N8[:, 1::2] = _HEX[bytes_N4 >> 4], _HEX[bytes_N4 & 15]
    offsets = pa.py_buffer(np.arange(0, 8 * len(digits_N8) + 1, 8, dtype=np.int32))
    texts = pa.StringArray.from_buffers(len(digits_N8), offsets, pa.py_buffer(digits_N8.tobytes()))
    return pc.if_else(numbers.combine_chunks().is_valid(), texts, pa.scalar(None, pa.string()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlrm_example.data.generate",
        description="Make click logs in Criteo's format whose least possible log loss is known.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--rows", type=int, required=True, help="of all days together")
    parser.add_argument("--days", type=int, default=7, help="files; one alone is like Criteo Kaggle's train.txt")
    parser.add_argument("--format", default="tsv", help=f"one of {', '.join(FORMATS)}; parquet is the fastest")
    parser.add_argument("--overwrite", action="store_true", help="replace logs that were generated into --out")
    helps = {
        "num_ids": "ids a column",
        "columns": "sparse columns that the clicks depend on, from the first on; the others are noise",
        "clusters": "different vectors a column",
        "rank": "dims of the planted vectors",
        "zipf": "exponent of the ids' frequencies",
        "signal": "standard deviation of the log odds",
        "bias": "log odds where nothing else speaks",
        "missing": "fraction of values that are absent",
        "seed": "of truth and rows",
    }
    for field in dataclasses.fields(Truth):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=helps[field.name])
    return parser


if __name__ == "__main__":
    sys.exit(main())
