"""Prepared rows, vocabularies, counts and splits against plain Python; resuming; what is refused."""

import datetime
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_example.data import generate, sources
from dlrm_example.data import prepare as module
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import column_file, read_manifest
from dlrm_example.data.prepare import main
from dlrm_example.data.verify import main as check
from dlrm_example.data.vocabulary import Hashed, hash_values
from tests.data.rows import COLUMNS, SECONDS, Row, expected_ids, expected_row, prepared_rows, raw_rows, write


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_ROWS", 120)
    monkeypatch.setattr(sources, "CHUNK_ROWS", 32)
    monkeypatch.setattr(module, "ROW_GROUP_ROWS", 16)


def run(tmp_path: Path, *flags: str, raw: Path | None = None) -> Path:
    out = tmp_path / "prepared"
    assert main(["--input", str(raw or tmp_path / "raw"), "--out", str(out), *COLUMNS, *flags]) == 0
    return out


def by_split(out: Path) -> dict[str, list[Row]]:
    return {split: prepared_rows(out, split) for split in ("train", "val", "test")}


def raw_by_split(rows: list[Row], out: Path) -> dict[str, list[Row]]:
    """The raw rows that went into each split, which the column `row` names."""
    return {split: [rows[int(row["row"])] for row in found] for split, found in by_split(out).items()}


@pytest.mark.parametrize("min_count", [1, 4])
def test_rows_vocabularies_and_counts(tmp_path: Path, min_count: int) -> None:
    rows = raw_rows(1000)
    write(tmp_path / "raw" / "a.parquet", rows[:380])
    write(tmp_path / "raw" / "deeper" / "b.parquet", rows[380:], row_group_size=1000)
    out = run(tmp_path, "--min_count", str(min_count))
    raw = raw_by_split(rows, out)
    assert sorted(row["row"] for part in raw.values() for row in part) == [row["row"] for row in rows]
    assert all(70 < len(raw[split]) < 130 for split in ("val", "test"))

    vocabularies = {name: expected_ids(raw["train"], name, min_count) for name in ("u", "i", "tags")}
    ids = {name: found for name, (found, _) in vocabularies.items()}
    for split, found in by_split(out).items():
        assert found == [expected_row(row, ids) for row in raw[split]]
    columns = {column.name: column for column in read_manifest(out).sparse}
    for name, (found, counts) in vocabularies.items():
        assert np.load(column_file(out, "counts", name)).tolist() == counts
        assert columns[name].num_embeddings == len(counts) == len(found) + 2
        assert pq.read_table(column_file(out, "vocabulary", name))["value"].to_pylist() == list(found)
    assert [column.multi_hot for column in columns.values()] == [False, False, True]
    assert check([str(out)]) == 0


def test_globs_and_hive_partitions(tmp_path: Path) -> None:
    rows = raw_rows(90)
    for day in range(3):
        write(tmp_path / "raw" / f"day={day}" / "x.parquet", rows[30 * day : 30 * day + 30])
    flags = ["--split", "last_day", "--time_column", "day", "--time_unit", "days"]
    out = tmp_path / "prepared"
    columns = [*COLUMNS[:-1], "u,i,tags,day"]
    assert main(["--input", str(tmp_path / "raw" / "day=*"), "--out", str(out), *columns, *flags]) == 0
    raw = raw_by_split(rows, out)
    assert [row["row"] for row in raw["train"]] == list(range(60))
    assert len(raw["val"]) + len(raw["test"]) == 30
    assert {row["day"] for row in prepared_rows(out, "train")} == {2, 3}, "the last day is in no vocabulary"
    assert {row["day"] for row in prepared_rows(out, "test")} == {1}


@pytest.mark.parametrize("kind", ["integers", "timestamps"])
def test_splits_by_time(tmp_path: Path, kind: str) -> None:
    rows = raw_rows(700)
    day = 3_000 if kind == "integers" else 86_400
    for row in rows:
        row["ts"] = SECONDS + (row["ts"] - SECONDS) * day // 3_000
        if kind == "timestamps":
            row["ts"] = datetime.datetime.fromtimestamp(row["ts"], datetime.UTC)
    write(tmp_path / "raw.parquet", rows[::-1])
    raw = raw_by_split(rows, run(tmp_path, "--split", "time", "--time_column", "ts", raw=tmp_path / "raw.parquet"))
    latest = {split: max(row["ts"] for row in part) for split, part in raw.items()}
    earliest = {split: min(row["ts"] for row in part) for split, part in raw.items()}
    assert latest["train"] < earliest["val"] <= latest["val"] < earliest["test"]
    assert 60 <= len(raw["test"]) <= 70
    assert 60 <= len(raw["val"]) <= 75


def test_split_by_last_day(tmp_path: Path) -> None:
    rows = raw_rows(700)
    start = SECONDS - SECONDS % 86_400
    for row in rows:
        row["ts"] = start + int(row["row"]) * 86_400 * 3 // 700  # three days
    write(tmp_path / "raw" / "x.parquet", rows)
    raw = raw_by_split(rows, run(tmp_path, "--split", "last_day", "--time_column", "ts"))
    last = [row for row in rows if row["ts"] >= start + 2 * 86_400]
    assert raw["train"] == rows[: -len(last)]
    assert raw["val"] + raw["test"] == last
    assert abs(len(raw["val"]) - len(raw["test"])) <= 1


INTEGERS = [7, -3, None, 2**31, 7]
KINDS = {  # types of the column u in two files, and its values
    "wider later": ((pa.int16(), [7, -3, None, 30_000, 7]), (pa.int64(), INTEGERS)),
    "nulls first": ((pa.null(), [None] * 5), (pa.int64(), INTEGERS)),
    "nulls, then lists": ((pa.null(), [None] * 5), (pa.list_(pa.string()), [["a"], [], None, ["b", None, "a"], ["a"]])),
    "lists": (
        (pa.list_(pa.int8(), 2), [[1, 2], None, [1, 1], [2, 2], [3, 3]]),
        (pa.large_list(pa.int64()), [[2**40]] * 5),
    ),
    "lists of texts": (
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), [["a", None], None, [], ["b", "a"], ["c"]]),
        (pa.large_list(pa.string()), [["d"], ["a"], None, ["b", None, "b"], []]),
    ),
    "texts": ((pa.dictionary(pa.int8(), pa.string()), list("abcab")), (pa.large_string(), ["a", "b", None, "d", ""])),
    "views": ((pa.string_view(), list("abcab")), (pa.string_view(), ["a", "b", None, "d", ""])),
    "booleans": ((pa.bool_(), [True, None, False, True, True]), (pa.null(), [None] * 5)),
    "hashes": ((pa.uint64(), [2**64 - 1, 2**63, 5, None, 5]), (pa.uint64(), [2**64 - 1, 0, 1, 2, 3])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_different_types(tmp_path: Path, kind: str) -> None:
    """All that a column's types have in common is what counts, and the first file's type is not more than another's."""
    values = []
    for number, (of_file, content) in enumerate(KINDS[kind]):
        content = content * 20
        values += content
        rows = {"y": [0, 1] * 50, "row": [float(len(values) - 100 + place) for place in range(100)], "a": [0.0] * 100}
        table = pa.table({**{name: pa.array(found) for name, found in rows.items()}, "u": pa.array(content, of_file)})
        (tmp_path / "raw").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "raw" / f"{number}.parquet")
    out = tmp_path / "prepared"
    flags = ["--label_column", "y", "--dense_columns", "row,a", "--sparse_columns", "u"]
    assert main(["--input", str(tmp_path / "raw"), "--out", str(out), *flags]) == 0
    vocabulary = pq.read_table(column_file(out, "vocabulary", "u"))["value"].to_pylist()
    several = any(isinstance(value, list) for value in values)
    for row in itertools.chain(*by_split(out).values()):
        raw, ids = values[int(row["row"])], row["u"] if several else [row["u"]]
        wanted = ([each for each in raw or [] if each is not None]) if several else [raw]
        found = [None if each == 0 else vocabulary[each - 2] for each in ids]
        if kind == "hashes":
            found = [None if each is None else each % 2**64 for each in found]
        assert found == wanted


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw" / "0.parquet", raw_rows(60))
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    assert main(["--input", str(tmp_path / "raw"), "--out", out, *COLUMNS]) == 1
    assert generate.main(["--out", out, "--rows", "10", "--days", "2"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") and "file" in error for error in errors)


def test_types_with_nothing_in_common_are_an_error_where_they_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = raw_rows(60)
    write(tmp_path / "raw" / "0.parquet", rows)
    for row in rows:
        row["u"] = "text"
    write(tmp_path / "raw" / "1.parquet", rows)
    flags = ["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "column u is int64 in " in error
    assert "1.parquet, which have no type in common" in error
    assert main([*flags, "--sparse_columns", "i,tags"]) == 0


def test_hashing(tmp_path: Path) -> None:
    rows = raw_rows(400)
    write(tmp_path / "raw" / "x.parquet", rows)
    out = run(tmp_path, "--hash_buckets", "u=7,tags=50")
    assert {column.name: column.num_embeddings for column in read_manifest(out).sparse if column.name != "i"} == {
        "u": 7,
        "tags": 50,
    }
    raw = raw_by_split(rows, out)
    by_value: dict[object, set[int]] = {}
    for split, found in by_split(out).items():
        for row, encoded in zip(raw[split], found, strict=True):
            by_value.setdefault(row["u"], set()).add(encoded["u"])
    assert by_value[None] == {0}
    assert all(len(ids) == 1 for ids in by_value.values()), "one id a value, in every split"
    assert set.union(*by_value.values()) == set(range(7))
    assert np.load(column_file(out, "counts", "u")).sum() == len(raw["train"])
    assert not column_file(out, "vocabulary", "u").exists()


def test_hashes_are_spread_evenly_and_see_every_byte() -> None:
    for values in (pa.array(range(20_000)), pa.array([f"user {number}" for number in range(20_000)])):
        counts = np.bincount(Hashed(101).encode(values), minlength=101)[1:]
        assert counts.sum() == 20_000
        assert ((counts - 200) ** 2 / 200).sum() < 150, "chi-squared of 99 degrees of freedom: 99 on average"
    texts = ["", "a", "\0", "a\0", "\0a", "aa", "ab", "ba", "b" * 50, "b" * 51]
    hashes = hash_values(pa.array(texts, pa.large_string()))
    assert len(set(hashes.tolist())) == len(texts)
    assert hash_values(pa.array([None, *texts], pa.large_string()).slice(3)).tolist() == hashes[2:].tolist()


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "raw" / "x.parquet", raw_rows(1000))
    whole = run(tmp_path)
    expected = by_split(whole)
    whole.rename(tmp_path / "whole")
    written: list[str] = []
    real = module._write

    def write_some(table: pa.Table, name: str, work: Path) -> list[dict[str, object]]:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(name)
        return real(table, name, work)

    flags = ["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS, "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", write_some)
        assert main(flags) == 130
    assert not (tmp_path / "prepared").exists(), "visible only when it is complete"
    assert main([*flags, "--min_count", "2"]) == 2, "another preparation does not go on with this one"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared.partial" / "parts").iterdir()}
    assert before
    again: list[str] = []
    monkeypatch.setattr(module, "_write", lambda table, name, work: again.append(name) or real(table, name, work))
    assert main(flags) == 0
    done = {f"train/part_{int(path.stem):06d}.parquet" for path in before}
    assert not done & set(again), "finished parts are skipped"
    assert by_split(tmp_path / "prepared") == expected
    assert not (tmp_path / "prepared.partial").exists()


def test_rows_without_a_label_are_counted_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = raw_rows(300)
    rows[7]["y"], rows[200]["y"] = None, 3
    write(tmp_path / "raw" / "x.parquet", rows)
    flags = ["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS]
    assert main([*flags, "--max_bad_lines", "1"]) == 1
    assert "2 malformed lines or rows are more than --max_bad_lines 1" in capsys.readouterr().err
    assert main([*flags, "--max_bad_lines", "2"]) == 0
    made_by = read_manifest(tmp_path / "prepared").made_by
    assert made_by["bad_examples"] == ["row 7: y is None", "row 200: y is 3"]
    assert (made_by["bad_rows"], sum(made_by["rows"].values())) == (2, 298)


def test_changed_files_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw" / "x.parquet", raw_rows(300))
    out = run(tmp_path)
    path = out / read_manifest(out).splits["val"][0].path
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert check([str(out)]) == 1
    assert f"{path}: sha256 is" in capsys.readouterr().err
    path.write_bytes(content[:-1])
    with pytest.raises(DataUnavailableError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
        read_manifest(out)
    with pytest.raises(DataUnavailableError, match=r"raw holds no manifest\.json"):
        read_manifest(tmp_path / "raw")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparse_columns u,v", "no column named v in --input; there are y, row, a, u, i, tags, ts"),
        ("--dense_columns row --sparse_columns u,a", "--sparse_columns a: ids are double"),
        ("--dense_columns i --sparse_columns u", "--dense_columns i is dictionary"),
        ("--dense_columns u", "columns u are given twice"),
        ("--label_column i --sparse_columns u", "--label_column i is dictionary"),
        ("--split time", "--split time needs --time_column"),
        ("--split last_day --time_column a", "--time_column a has nulls"),
        ("--time_column ts", "say whether --split time or --split last_day"),
        ("--val_fraction 0.6 --test_fraction 0.4", "leave rows for training"),
        ("--hash_buckets v=10", "--hash_buckets names v"),
        ("--hash_buckets 1", "must be at least 2"),
        ("--format csv", "--format 'csv' is unknown; there are parquet, criteo_kaggle"),
        ("--input nowhere", "--input nowhere names no file"),
    ],
)
def test_what_is_refused(tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw" / "x.parquet", raw_rows(60))
    out = tmp_path / "prepared"
    assert main(["--input", str(tmp_path / "raw"), "--out", str(out), *COLUMNS, *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_prepared_data_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw" / "x.parquet", raw_rows(100))
    out = run(tmp_path)
    flags = ["--input", str(tmp_path / "raw"), "--out", str(out), *COLUMNS]
    assert main(flags) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*flags, "--overwrite", "--min_count", "3"]) == 0
    assert json.loads((out / "manifest.json").read_text())["made_by"]["settings"]["min_count"] == 3
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    assert main([*flags[:3], str(tmp_path / "home"), *COLUMNS, "--overwrite"]) == 2
    assert (tmp_path / "home" / "thesis.txt").exists(), "what is no prepared data is not replaced"
