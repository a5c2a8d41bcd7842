"""Criteo's click logs, as text: a label, 13 integers and 26 hexadecimal ids a line, tabs between; plain or gzip.

Text becomes Parquet files of the same values, a piece of some ten megabytes each, which are then prepared like any other.
"""

import gzip
import io
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_LABEL, CRITEO_SPARSE
from dlrm_example.data.working import BadRows, in_order
from dlrm_example.records import replace_atomically

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 24
LINE = re.compile(rb"[01](\t(-?\d{1,18})?){13}(\t[0-9a-fA-F]{0,8}){26}")
COLUMNS = (CRITEO_LABEL, *CRITEO_DENSE, *CRITEO_SPARSE)
_TYPES = {name: pa.string() if name in CRITEO_SPARSE else pa.int64() for name in COLUMNS}
_FORMAT = csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, ignore_empty_lines=False)
_VALUES = csv.ConvertOptions(column_types=_TYPES, null_values=[""], strings_can_be_null=True)
_NO_DIGIT = 255
_DIGITS = np.full(256, _NO_DIGIT, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdefABCDEF", np.uint8)] = [*range(16), *range(10, 16)]


def text_to_parquet(
    files: Sequence[Path], folder: Path, bad: BadRows, workers: int, advance: Callable[[int], object]
) -> list[list[Path]]:
    """The Parquet files made of each text file; what an interrupted call has made is not made again.

    Args:
        advance: called with the rows of every finished piece.

    Raises:
        DataUnavailableError: a gzip file is truncated or damaged, or there are too many malformed lines.
    """
    folder.mkdir(exist_ok=True)
    made: list[list[Path]] = []
    with ThreadPoolExecutor(workers) as pool:
        for number, file in enumerate(files):
            jobs = (
                (lambda path=path, piece=piece, file=file: _stage(path, piece, file))
                for path, piece in _pieces(file, folder, number)
            )
            made.append([])
            for path in in_order(pool, jobs, 2 * workers):
                rows, found, examples = _about(path)
                bad.add(found, examples)
                advance(rows)
                made[-1].append(path)
    return made


def _pieces(file: Path, folder: Path, number: int) -> Iterator[tuple[Path, bytes | None]]:
    """Where each piece of text goes, and its lines; None where that is done."""
    finished = folder / f"file_{number:04d}.pieces"
    if finished.exists():
        yield from ((folder / name, None) for name in finished.read_text().split())
        return
    names = []
    for piece, lines in enumerate(_lines(file)):
        path = folder / f"file_{number:04d}_piece_{piece:06d}.parquet"
        names.append(path.name)
        yield path, None if path.exists() else lines
    with replace_atomically(finished) as temporary:
        temporary.write_text("\n".join(names))


def _lines(file: Path) -> Iterator[bytes]:
    """The text in pieces of whole lines, cut at the same places every time."""
    rest = b""
    try:
        with _open(file) as text:
            while block := text.read(PIECE_BYTES):
                end = block.rfind(b"\n") + 1
                if end:
                    yield rest + block[:end]
                    rest = block[end:]
                else:
                    rest += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataUnavailableError(f"{file} is truncated or damaged ({error}); fetch it again") from None
    if rest:
        yield rest


def _open(file: Path) -> BinaryIO:
    with open(file, "rb") as start:
        packed = start.read(2) == b"\x1f\x8b"
    return io.BufferedReader(gzip.open(file, "rb")) if packed else open(file, "rb")


def _stage(path: Path, lines: bytes | None, file: Path) -> Path:
    if lines is not None:
        table, bad = parse(lines)
        examples = "".join(f"{file.name}: {text[:60]!r}\n" for text in bad[: BadRows.SHOWN])
        table = table.replace_schema_metadata({"bad": str(len(bad)), "examples": examples})
        with replace_atomically(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=1 << 20)
    return path


def _about(path: Path) -> tuple[int, int, list[str]]:
    about = pq.read_metadata(path)
    found = about.metadata
    return about.num_rows, int(found[b"bad"]), found[b"examples"].decode().splitlines()


def parse(lines: bytes) -> tuple[pa.Table, list[bytes]]:
    """The rows of some whole lines, and the malformed lines, which are none of them."""
    table = _parse_well_formed(lines)
    if table is not None:
        return table, []
    rows = [line.removesuffix(b"\r") for line in lines.removesuffix(b"\n").split(b"\n")]
    good = [row for row in rows if LINE.fullmatch(row)]
    bad = [row for row in rows if not LINE.fullmatch(row)]
    table = _parse_well_formed(b"\n".join([*good, b""]))
    assert table is not None, "every line has the form of a line"
    return table, bad


def _parse_well_formed(lines: bytes) -> pa.Table | None:
    """The rows, or None where any line is malformed."""
    if not lines:
        return pa.table(
            {name: pa.array([], pa.uint32() if name in CRITEO_SPARSE else _TYPES[name]) for name in COLUMNS}
        )
    options = csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=1 << 23)
    try:
        table = csv.read_csv(io.BytesIO(lines), options, _FORMAT, _VALUES)
    except pa.ArrowInvalid:
        return None
    labels = table[CRITEO_LABEL]
    if labels.null_count or not pc.all(pc.or_(pc.equal(labels, 0), pc.equal(labels, 1))).as_py():
        return None
    numbers = {}
    for name in CRITEO_SPARSE:
        numbers[name] = hex_to_numbers(table[name].combine_chunks())
        if numbers[name] is None:
            return None
    return pa.table({name: numbers.get(name, table[name]) for name in COLUMNS})


def hex_to_numbers(texts: pa.Array) -> pa.Array | None:
    """Up to eight hexadecimal digits each as uint32, or None where one is something else."""
    lengths = pc.binary_length(texts)
    if (pc.max(lengths).as_py() or 0) > 8:
        return None
    padded = pc.utf8_lpad(texts.fill_null("0"), 8, "0")
    _, _, buffer = padded.buffers()
    characters = np.frombuffer(buffer, np.uint8)[: 8 * len(padded)] if buffer else np.zeros(0, np.uint8)
    digits_N8 = _DIGITS[characters].reshape(-1, 8)
    if (digits_N8 == _NO_DIGIT).any():
        return None
    bytes_N4 = (digits_N8[:, 0::2] << 4) | digits_N8[:, 1::2]
    numbers_N = bytes_N4.view(">u4").reshape(-1).astype(np.uint32)
    return pa.array(numbers_N, mask=texts.is_null().to_numpy(zero_copy_only=False))
