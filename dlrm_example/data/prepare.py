"""Prepare data for training: `python -m dlrm_example.data.prepare --input logs/ --out prepared --label_column y ...`.

The steps: rows in parts -> split rule -> count the training rows' values -> encoders -> encoded parts -> manifest. All of it
happens in `OUT.partial`, where an interrupted preparation goes on, and which becomes `OUT` at the end.

No step holds more than some chunks of rows a worker, and the vocabularies.
"""

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_example.config import UsageError
from dlrm_example.console import set_up_logging
from dlrm_example.data.dataset import SPLITS
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.encoding import encode_rows, flat_values, has_label
from dlrm_example.data.inputs import Input, open_input
from dlrm_example.data.manifest import (
    FIRST_ID,
    MANIFEST,
    DataFile,
    Manifest,
    SparseColumn,
    column_file,
    read_manifest,
    sha256,
)
from dlrm_example.data.prepare_config import PrepareConfig, parse_prepare_config
from dlrm_example.data.sources import Part, find_files
from dlrm_example.data.splits import TRAIN
from dlrm_example.data.vocabulary import Counter, Encoder, Hashed, Vocabulary, VocabularyCounter
from dlrm_example.data.working import BadRows, in_order, rows_bar
from dlrm_example.records import read_json, replace_atomically, write_json

logger = logging.getLogger("dlrm_example.data.prepare")  # under `python -m`, __name__ is "__main__"

SETTINGS = "settings.json"
ROW_GROUP_ROWS = 1 << 15  # what a training reads, and shuffles, as one
FREE_TO_CHANGE = ("out", "workers", "overwrite", "max_bad_lines")  # when an interrupted preparation goes on


def main(argv: Sequence[str] | None = None) -> int:
    """0 for prepared data, 2 for flags that cannot be, 1 for data that cannot be used or written, 130 for Ctrl-C."""
    set_up_logging()
    try:
        prepare(parse_prepare_config(argv))
    except (UsageError, DataUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"error: {error}; the same command goes on with what is done", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def prepare(config: PrepareConfig) -> Manifest:
    """Make `config.out`, or go on making it.

    Raises:
        UsageError: the flags do not fit the data, or `out` holds something already.
        DataUnavailableError: damaged input, or too many bad rows.
    """
    started = time.perf_counter()
    out = Path(config.out)
    work = out.with_name(f"{out.name}.partial")
    files = find_files(config.input, {"parquet": (".parquet",), "criteo_npy": (".npy",)}.get(config.format, ()))
    _begin(config, out, work, files)
    bad = BadRows(config.max_bad_lines)
    rows = open_input(config, files, work, bad)
    if not rows.num_rows:
        raise UsageError(f"--input {' '.join(config.input)} has no rows")
    encoders = _encoders(rows, config, work)
    parts = _encode(rows, encoders, config, work, bad)
    manifest = _manifest(rows, encoders, parts, config, bad)
    _publish(manifest, work, out, config.overwrite)
    seconds = time.perf_counter() - started
    counts = {split: sum(file.num_rows for file in found) for split, found in manifest.splits.items()}
    logger.info("%s: %s rows, %d bad, %.0f rows/s", out, counts, bad.count, rows.num_rows / seconds)
    for example in bad.examples:
        logger.warning("left out: %s", example)
    return manifest


def _begin(config: PrepareConfig, out: Path, work: Path, files: Sequence[Path]) -> None:
    """Make the working folder, or see that the one that is there is of the same preparation."""
    if out.exists() and not config.overwrite:
        raise UsageError(f"--out {out} exists: give --overwrite, or another folder")
    if out.exists() and not (out / MANIFEST).exists():
        raise UsageError(f"--out {out} holds no prepared data, so --overwrite does not replace it; give another folder")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    settings["files"] = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if (work / SETTINGS).exists():
        there = read_json(work / SETTINGS)
        changed = [name for name in settings if there.get(name) != settings[name]]
        if not changed:
            logger.info("going on in %s", work)
            return
        made = [path for path in work.rglob("*") if path.is_file() and path.name != SETTINGS]
        if made and not config.overwrite:
            raise UsageError(
                f"{work} is of a preparation with other {', '.join(changed)}: remove it, or give --overwrite"
            )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / SETTINGS, settings)


def _encoders(rows: Input, config: PrepareConfig, work: Path) -> dict[str, Encoder]:
    """Of every sparse column, as counted now or by the call that was interrupted."""
    for folder in ("vocabulary", "counts"):
        (work / folder).mkdir(exist_ok=True)
    if not (work / "counted").exists():
        counters = _count(rows, config)
        for name in rows.sparse:
            values, counts_V = counters.pop(name).result()  # which frees its memory
            np.save(column_file(work, "counts", name), counts_V)
            if values is not None:
                vocabulary = pa.table({"value": values, "count": counts_V[FIRST_ID:]})
                pq.write_table(vocabulary, column_file(work, "vocabulary", name))
        (work / "counted").touch()
    return {name: _saved_encoder(name, config, work) for name in rows.sparse}


def _saved_encoder(name: str, config: PrepareConfig, work: Path) -> Encoder:
    buckets = config.buckets_of(name)
    if buckets is not None:
        return Hashed(buckets)
    return Vocabulary(pq.read_table(column_file(work, "vocabulary", name), columns=["value"])["value"].combine_chunks())


def _count(rows: Input, config: PrepareConfig) -> dict[str, Counter]:
    counters = {name: _counter(name, config) for name in rows.sparse}
    with rows_bar("counting", rows.num_rows) as advance, ThreadPoolExecutor(config.workers) as pool:
        for _, part, first in rows.numbered():
            for table in part.read(rows.columns):
                train = (rows.splitter.assign(table, first) == TRAIN) & has_label(table, rows.label)
                first += len(table)
                kept = table.filter(pa.array(train))

                def add(name: str, kept: pa.Table = kept) -> None:
                    counters[name].add(flat_values(kept, name, config.max_ind_range)[0])

                list(pool.map(add, counters))
                advance(len(table))
    return counters


def _counter(name: str, config: PrepareConfig) -> Counter:
    buckets = config.buckets_of(name)
    return VocabularyCounter(config.min_count) if buckets is None else Hashed(buckets)


def _encode(
    rows: Input, encoders: dict[str, Encoder], config: PrepareConfig, work: Path, bad: BadRows
) -> list[dict[str, list[DataFile]]]:
    """Every part's files by split."""
    for folder in (*SPLITS, "parts"):
        (work / folder).mkdir(exist_ok=True)
    made = []
    with rows_bar("encoding", rows.num_rows) as advance, ThreadPoolExecutor(config.workers) as pool:
        jobs = (partial(_encode_part, *each, rows, encoders, config, work) for each in rows.numbered())
        for record in in_order(pool, jobs, config.workers + 1):
            bad.add(record["bad"], record["examples"])
            found = {split: [DataFile(**file) for file in files] for split, files in record["files"].items()}
            made.append(found)
            advance(record["rows"])
    return made


def _encode_part(
    number: int, part: Part, first: int, rows: Input, encoders: dict[str, Encoder], config: PrepareConfig, work: Path
) -> dict[str, Any]:
    """What `parts/N.json` says, which is written when the part's files are there."""
    record_path = work / "parts" / f"{number}.json"
    if record_path.exists():
        return read_json(record_path)
    encoded: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    num_bad, examples = 0, []
    for table in part.read(rows.columns):
        good = has_label(table, rows.label)
        split_of_row = rows.splitter.assign(table, first)
        for row in np.flatnonzero(~good)[: BadRows.SHOWN]:
            examples.append(f"row {first + row}: {rows.label} is {table[rows.label][int(row)].as_py()}")
        num_bad += int((~good).sum())
        first += len(table)
        stored = encode_rows(
            table.filter(pa.array(good)), rows.label, rows.dense, encoders, rows.transform, config.max_ind_range
        )
        for place, split in enumerate(SPLITS):
            encoded[split].append(stored.filter(pa.array(split_of_row[good] == place)))
    files = {
        split: _write(pa.concat_tables(tables), f"{split}/part_{number:06d}.parquet", work)
        for split, tables in encoded.items()
    }
    record = {"rows": part.num_rows, "bad": num_bad, "examples": examples[: BadRows.SHOWN], "files": files}
    write_json(record_path, record)
    return record


def _write(table: pa.Table, name: str, work: Path) -> list[dict[str, Any]]:
    if not len(table):
        return []
    with replace_atomically(work / name) as temporary:
        pq.write_table(table, temporary, compression="lz4", row_group_size=ROW_GROUP_ROWS, use_dictionary=False)
    about = pq.read_metadata(work / name)
    groups = tuple(about.row_group(number).num_rows for number in range(about.num_row_groups))
    size = (work / name).stat().st_size
    return [dataclasses.asdict(DataFile(path=name, row_groups=groups, num_bytes=size, sha256=sha256(work / name)))]


def _manifest(
    rows: Input,
    encoders: dict[str, Encoder],
    parts: list[dict[str, list[DataFile]]],
    config: PrepareConfig,
    bad: BadRows,
) -> Manifest:
    splits = {split: tuple(file for part in parts for file in part[split]) for split in SPLITS}
    empty = [split for split, files in splits.items() if not files]
    if empty:
        raise UsageError(f"no rows fall into {', '.join(empty)}: change --split, or the fractions")
    sparse = [
        SparseColumn(name=name, num_embeddings=encoders[name].num_embeddings, multi_hot=multi_hot)
        for name, multi_hot in rows.sparse.items()
    ]
    made_by = {
        "versions": {name: version(name) for name in ("cce-torchrec", "pyarrow")},
        "settings": dataclasses.asdict(config),
        "split": dataclasses.asdict(rows.splitter),  # type: ignore[call-overload]
        "rows": {split: sum(file.num_rows for file in files) for split, files in splits.items()},
        "bad_rows": bad.count,
        "bad_examples": bad.examples,
    }
    return Manifest(label=rows.label, dense=rows.dense, sparse=tuple(sparse), splits=splits, made_by=made_by)


def _publish(manifest: Manifest, work: Path, out: Path, overwrite: bool) -> None:
    """Leave only what belongs to prepared data, then give it its name."""
    write_json(work / MANIFEST, manifest.to_json())
    read_manifest(work)
    for name in ("text", "parts"):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (SETTINGS, "counted"):
        (work / name).unlink()
    old = out.with_name(f"{out.name}.replaced")
    if out.exists():
        assert overwrite, "looked at when the preparation began"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
