"""Generated logs: the planted truth against brute force, and that nothing can be told better than it tells."""

import itertools
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dlrm_example.data import generate as module
from dlrm_example.data.generate import main, spread
from dlrm_example.data.manifest import read_manifest
from dlrm_example.data.prepare import main as prepare
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_SPARSE
from dlrm_example.data.truth import ABSENT, Truth
from dlrm_example.records import read_json


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 128)


@pytest.mark.parametrize("columns", [26, 4])
def test_scores_are_those_of_the_formula(columns: int) -> None:
    truth = Truth(num_ids=500, columns=columns, clusters=7, rank=3, missing=0.3)
    draw = truth.draw(40, 0)
    w_D, a_FC, u_FCR = truth._parts
    for dense, ids, score in zip(draw.dense_ND, draw.ids_NF, truth.scores(draw.dense_ND, draw.ids_NF), strict=True):
        expected = sum(w * math.log1p(x) for w, x in zip(w_D, dense, strict=True) if x != ABSENT)
        present = [
            (column, int(truth.cluster(column, ids[column : column + 1])[0]))
            for column in np.flatnonzero(ids[:columns] >= 0)
        ]
        expected += sum(a_FC[each] for each in present)
        expected += sum(float(u_FCR[one] @ u_FCR[other]) for one, other in itertools.combinations(present, 2))
        assert score == pytest.approx(expected)


def test_labels_are_coins_of_the_probabilities() -> None:
    truth = Truth(num_ids=2000, signal=2.0)
    draw = truth.draw(40_000, 3)
    order = np.argsort(draw.probability_N)
    for rows in np.array_split(order, 20):
        mean, count = draw.probability_N[rows].mean(), len(rows)
        assert abs(draw.labels_N[rows].mean() - mean) < 4 * math.sqrt(mean * (1 - mean) / count)
    logits = np.log(draw.probability_N / (1 - draw.probability_N))
    assert logits.std() == pytest.approx(2.0, rel=0.1)
    again = truth.draw(40_000, 3)
    assert np.array_equal(again.labels_N, draw.labels_N)
    assert not np.array_equal(truth.draw(40_000, 4).labels_N, draw.labels_N)


@pytest.mark.parametrize("zipf", [0.0, 0.8, 1.0, 1.3])
def test_ids_follow_zipfs_law(zipf: float) -> None:
    count = 100_000
    ids = Truth(num_ids=1000, zipf=zipf)._zipf(np.random.default_rng(0).random(count))
    edges = np.arange(1, 1002, dtype=float)
    masses = np.diff(np.log(edges) if zipf == 1 else edges ** (1 - zipf) / (1 - zipf))
    expected = masses / masses.sum() * count
    found = np.bincount(ids, minlength=1000)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 1).all()


def test_clusters_are_of_equal_size_and_ids_stay_different() -> None:
    truth = Truth(clusters=10)
    ids = np.arange(20_000)
    counts = np.bincount(truth.cluster(3, ids), minlength=10)
    assert len(counts) == 10
    assert (np.abs(counts - 2000) < 250).all()
    assert (truth.cluster(3, ids) != truth.cluster(4, ids)).mean() > 0.8
    assert len(np.unique(spread(ids, 3))) == len(ids)


def test_the_floor_is_of_the_splits_that_prepare_makes(tmp_path: Path) -> None:
    flags = ["--rows", "1003", "--days", "3", "--num_ids", "300", "--missing", "0.2"]
    assert main(["--out", str(tmp_path / "logs"), *flags]) == 0
    said = read_json(tmp_path / "logs" / "truth.json")
    out = tmp_path / "prepared"
    assert prepare(["--input", str(tmp_path / "logs" / "day_*"), "--format", "criteo_1t", "--out", str(out)]) == 0
    assert {split: found["rows"] for split, found in said["splits"].items()} == read_manifest(out).made_by["rows"]

    draws = [
        Truth(num_ids=300, missing=0.2).draw(size, number)
        for number, size in enumerate([128, 128, 78] * 2 + [128, 128, 79])
    ]
    p = np.concatenate([draw.probability_N for draw in draws])
    labels = np.concatenate([draw.labels_N for draw in draws])
    entropies = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert said["bayes_log_loss"] == pytest.approx(entropies.mean())
    assert said["files"][1]["bayes_log_loss"] == pytest.approx(entropies[334:668].mean())
    assert said["splits"]["test"]["bayes_log_loss"] == pytest.approx(entropies[-167:].mean())
    assert said["log_loss_of_truth"] == pytest.approx(-np.log(np.where(labels == 1, p, 1 - p)).mean())
    train = [
        row
        for file in read_manifest(out).splits["train"]
        for row in pq.read_table(out / file.path)["label"].to_pylist()
    ]
    assert train == labels[:668].tolist()


@pytest.mark.parametrize("format", ["tsv.gz", "parquet"])
def test_formats_hold_the_same_rows(tmp_path: Path, format: str) -> None:
    flags = ["--rows", "500", "--num_ids", "50", "--missing", "0.2", "--days"]
    assert main(["--out", str(tmp_path / "tsv"), *flags, "1"]) == 0
    text = [line.split("\t") for line in (tmp_path / "tsv" / "train.txt").read_text().splitlines()]
    assert len(text) == 500
    assert main(["--out", str(tmp_path / "other"), *flags, "1", "--format", format]) == 0
    if format == "parquet":
        rows = pq.read_table(tmp_path / "other" / "day=0" / "rows.parquet").to_pylist()
        for row, fields in zip(rows, text, strict=True):
            found = [row["label"], *(row[name] for name in CRITEO_DENSE)]
            assert ["" if value is None else str(value) for value in found] == fields[:14]
            assert ["" if row[name] is None else f"{row[name]:08x}" for name in CRITEO_SPARSE] == fields[14:]
    else:
        prepared = [tmp_path / "a", tmp_path / "b"]
        for folder, name in zip(prepared, ["tsv/train.txt", "other/train.txt.gz"], strict=True):
            assert prepare(["--input", str(tmp_path / name), "--format", "criteo_kaggle", "--out", str(folder)]) == 0
        assert read_manifest(prepared[0]).splits == read_manifest(prepared[1]).splits, "checksums too"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows 5 --days 6", "--days is 6; it must be from 1 to --rows 5"),
        ("--rows 5 --days 1 --format csv", "--format 'csv' is unknown; there are tsv, tsv.gz, parquet"),
        ("--rows 5 --days 1 --num_ids 0", "--num_ids is 0"),
        ("--rows 5 --days 1 --missing 1", "--missing is 1.0"),
    ],
)
def test_what_is_refused(tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "logs"), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "logs"), "--rows", "9", "--days", "1"]) == 0
    assert main(["--out", str(tmp_path / "logs"), "--rows", "9", "--days", "1"]) == 2
    assert main(["--out", str(tmp_path / "logs"), "--rows", "9", "--days", "1", "--overwrite"]) == 0
