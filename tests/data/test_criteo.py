"""Criteo's text, read line by line in plain Python; damaged files; torchrec_dlrm's days."""

import gzip
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_example.data import criteo, sources
from dlrm_example.data.criteo import LINE, hex_to_numbers, parse
from dlrm_example.data.manifest import column_file, read_manifest
from dlrm_example.data.prepare import main
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_SPARSE
from tests.data.rows import prepared_rows


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "PIECE_BYTES", 5000)
    monkeypatch.setattr(sources, "PART_ROWS", 100)


def lines(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)

    def line() -> str:
        numbers = [draw.choice(["", "0", "-1", str(draw.randrange(5000))]) for _ in CRITEO_DENSE]
        ids = [draw.choice(["", f"{draw.randrange(6) * 0x1F3D5B79 % 2**32:08x}"]) for _ in CRITEO_SPARSE]
        return "\t".join([str(draw.randrange(2)), *numbers, *ids])

    return [line() for _ in range(count)]


def write_text(path: Path, text: list[str]) -> Path:
    content = "".join(f"{line}\n" for line in text).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def run(tmp_path: Path, *flags: str, inputs: list[Path]) -> int:
    return main(["--input", *map(str, inputs), "--out", str(tmp_path / "prepared"), *flags])


def check(folder: Path, by_split: dict[str, list[str]], modulus: int = 2**32) -> None:
    """Every value of every row against the lines."""
    split_fields = {split: [line.split("\t") for line in text] for split, text in by_split.items()}
    ids: dict[str, dict[int, int]] = {}
    for number, name in enumerate(CRITEO_SPARSE, start=14):
        counted = Counter(int(row[number], 16) % modulus for row in split_fields["train"] if row[number])
        order = sorted(counted, key=lambda value: (-counted[value], value))
        ids[name] = {value: place for place, value in enumerate(order, start=2)}
        missing = sum(not row[number] for row in split_fields["train"])
        assert np.load(column_file(folder, "counts", name)).tolist() == [missing, 0, *(counted[each] for each in order)]
    for split, rows in split_fields.items():
        for found, row in zip(prepared_rows(folder, split), rows, strict=True):
            assert found["label"] == int(row[0])
            for name, text in zip(CRITEO_DENSE, row[1:14], strict=True):
                assert found[name] == pytest.approx(math.log1p(max(int(text or 0), 0)), rel=1e-6)
            for name, text in zip(CRITEO_SPARSE, row[14:], strict=True):
                assert found[name] == (ids[name].get(int(text, 16) % modulus, 1) if text else 0)


def test_kaggle_has_seven_days_in_one_file(tmp_path: Path) -> None:
    text = lines(703)
    assert run(tmp_path, "--format", "criteo_kaggle", inputs=[write_text(tmp_path / "train.txt", text)]) == 0
    check(tmp_path / "prepared", {"train": text[:603], "val": text[603:653], "test": text[653:]})


def test_1t_has_a_file_a_day(tmp_path: Path) -> None:
    days = [lines(150, seed) for seed in range(3)]
    order = [2, 9, 10]  # by number, not by name
    files = [write_text(tmp_path / f"day_{number}.gz", day) for number, day in zip(order, days, strict=True)]
    flags = ["--format", "criteo_1t", "--max_ind_range", "1000"]
    assert main(["--input", str(tmp_path / "day_*.gz"), "--out", str(tmp_path / "prepared"), *flags]) == 0
    assert len(files) == 3
    check(tmp_path / "prepared", {"train": days[0] + days[1], "val": days[2][:75], "test": days[2][75:]}, 1000)


BAD = [
    "",
    "one line",
    "2" + lines(1)[0][1:],
    lines(1)[0] + "\t",
    lines(1)[0].replace("\t", "\t1.5", 1),
    "1" + "\t" * 38 + "\tzz",
    "1" + "\t" * 38 + "\t123456789",
    "1\t" + "9" * 30 + "\t" * 38,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_malformed_line_is_found_among_good_ones(bad: str) -> None:
    good = lines(20)
    table, found = parse("".join(f"{line}\n" for line in [*good[:7], bad, *good[7:]]).encode())
    assert found == [bad.encode()]
    assert table.equals(parse("".join(f"{line}\n" for line in good).encode())[0])
    assert len(table) == 20
    assert not LINE.fullmatch(bad.encode())


def test_malformed_lines_are_limited_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = lines(300)
    file = write_text(tmp_path / "train.txt", [*text[:100], BAD[1], *text[100:200], BAD[5], *text[200:]])
    assert run(tmp_path, "--format", "criteo_kaggle", inputs=[file]) == 1
    error = capsys.readouterr().err
    assert "1 malformed lines or rows are more than --max_bad_lines 0" in error
    assert "train.txt: b'one line'" in error
    assert run(tmp_path, "--format", "criteo_kaggle", "--max_bad_lines", "2", inputs=[file]) == 0
    made_by = read_manifest(tmp_path / "prepared").made_by
    assert made_by["bad_rows"] == 2
    assert made_by["bad_examples"][0] == "train.txt: b'one line'"
    check(tmp_path / "prepared", {"train": text[:258], "val": text[258:279], "test": text[279:]})


@pytest.mark.parametrize("damage", ["truncated", "checksum", "bits"])
def test_damaged_gzip_is_an_error(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_text(tmp_path / f"day_{number}.gz", lines(300, number)) for number in range(2)]
    content = bytearray(files[1].read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-8 if damage == "checksum" else len(content) // 2] ^= 0xFF
    files[1].write_bytes(content)
    assert run(tmp_path, "--format", "criteo_1t", "--max_bad_lines", "1000", inputs=files) == 1
    assert "day_1.gz is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "prepared").exists()


def test_text_is_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(400)
    file = write_text(tmp_path / "train.txt.gz", text)
    parsed: list[int] = []

    def stopping(piece: bytes) -> object:
        parsed.append(piece.count(b"\n"))
        if len(parsed) == 4:
            raise KeyboardInterrupt
        return parse(piece)

    flags = ["--format", "criteo_kaggle", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(criteo, "parse", stopping)
        assert run(tmp_path, *flags, inputs=[file]) == 130
    done = sum(parsed[:3])
    monkeypatch.setattr(criteo, "parse", lambda piece: (parsed.append(piece.count(b"\n")), parse(piece))[1])
    parsed.clear()
    assert run(tmp_path, *flags, inputs=[file]) == 0
    assert sum(parsed) == len(text) - done
    check(tmp_path / "prepared", {"train": text[:343], "val": text[343:372], "test": text[372:]})


def test_hexadecimal_digits() -> None:
    texts = ["0", "ff", "FFFFFFFF", "0000000a", None, "DeadBeef", "", "12345"]
    expected = [None if text is None else int(text or "0", 16) for text in texts]
    assert hex_to_numbers(pa.array(texts)).to_pylist() == expected
    assert hex_to_numbers(pa.array(texts).slice(3)).to_pylist() == expected[3:]
    assert hex_to_numbers(pa.array(["0g"])) is None
    assert hex_to_numbers(pa.array(["123456789"])) is None


def test_days_of_torchrec_dlrm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    days = []
    for day, rows in enumerate((230, 101)):
        arrays = {
            "dense": draw.normal(size=(rows, 13)).astype(np.float32),
            "sparse": draw.integers(0, 9, (rows, 26)).astype(np.int32),
            "labels": draw.integers(0, 2, (rows, 1)).astype(np.int32),
        }
        for kind, array in arrays.items():
            np.save(tmp_path / f"day_{day}_{kind}.npy", array)
        days.append(arrays)
    assert run(tmp_path, "--format", "criteo_npy", inputs=[tmp_path]) == 0
    folder = tmp_path / "prepared"
    for split, rows, day in (("train", slice(None), 0), ("val", slice(51), 1), ("test", slice(51, None), 1)):
        found = pa.concat_tables([pq.read_table(folder / file.path) for file in read_manifest(folder).splits[split]])
        assert found["label"].to_pylist() == days[day]["labels"][rows, 0].tolist()
        assert np.array_equal(np.stack([found[name] for name in CRITEO_DENSE], axis=1), days[day]["dense"][rows])
        values = pq.read_table(column_file(folder, "vocabulary", "cat_7"))["value"].to_numpy()
        assert values[found["cat_7"].to_numpy() - 2].tolist() == days[day]["sparse"][rows, 7].tolist()
    (tmp_path / "day_1_labels.npy").unlink()
    assert main(["--input", str(tmp_path), "--out", str(tmp_path / "other"), "--format", "criteo_npy"]) == 2
    assert "day_1_labels.npy" in capsys.readouterr().err
