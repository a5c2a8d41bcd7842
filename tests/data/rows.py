"""Small tables of raw rows, and what plain Python makes of them."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_example.data.manifest import read_manifest

Row = dict[str, Any]
SECONDS = 1_600_000_000
COLUMNS = ["--label_column", "y", "--dense_columns", "row,a", "--sparse_columns", "u,i,tags"]


def raw_rows(count: int, seed: int = 0) -> list[Row]:
    """A label, dense columns (`row` is the row's number), integer and text ids, a list column, and a time; with nulls."""
    draw = random.Random(seed)
    return [
        {
            "y": draw.randrange(2),
            "row": float(number),
            "a": draw.choice([None, 0.5, -2.0, 7.0, float("nan")]),
            "u": draw.choice([None, -5, 3, 2**40, *range(100, 100 + draw.randrange(1, 30))]),
            "i": draw.choice([None, "", "film", "färgfilm", *(f"s{draw.randrange(20)}" for _ in range(3))]),
            "tags": draw.choice([None, [], ["x"], ["x", None, "y"], ["z", "z", f"t{draw.randrange(4)}"]]),
            "ts": SECONDS + 100 * number // 7,
        }
        for number in range(count)
    ]


def write(path: Path, rows: Sequence[Row], *, row_group_size: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    table = table.set_column(table.schema.get_field_index("i"), "i", table["i"].dictionary_encode())
    pq.write_table(table, path, row_group_size=row_group_size)


def prepared_rows(folder: Path, split: str) -> list[Row]:
    files = read_manifest(folder).splits[split]
    return [row for file in files for row in pq.read_table(folder / file.path).to_pylist()]


def values_of(row: Row, name: str) -> list[Any]:
    """One for a plain column, null included; those that are not null of a list."""
    if name == "tags":
        return [tag for tag in row["tags"] or [] if tag is not None]
    return [row[name]]


def expected_ids(train: Sequence[Row], name: str, min_count: int) -> tuple[dict[Any, int], list[int]]:
    """The id of every value in the vocabulary, and how often each id occurs in training."""
    counted = Counter(value for row in train for value in values_of(row, name))
    nulls = counted.pop(None, 0)
    order = sorted(
        (value for value in counted if counted[value] >= min_count), key=lambda value: (-counted[value], _key(value))
    )
    rare = sum(counted.values()) - sum(counted[value] for value in order)
    return {value: place + 2 for place, value in enumerate(order)}, [nulls, rare, *(counted[value] for value in order)]


def _key(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def expected_row(row: Row, ids: dict[str, dict[Any, int]]) -> Row:
    """As prepared: id 0 for nulls, 1 for values not in the vocabulary; unknown numbers are 0."""
    encoded = {
        name: [0 if value is None else ids[name].get(value, 1) for value in values_of(row, name)] for name in ids
    }
    known = row["a"] is not None and row["a"] == row["a"]
    dense = {"row": row["row"], "a": float(np.float32(row["a"])) if known else 0.0}
    return {"y": row["y"], **dense, "u": encoded["u"][0], "i": encoded["i"][0], "tags": encoded["tags"]}
