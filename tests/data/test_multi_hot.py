"""Synthetic multi-hot ids against plain Python's integers, their distributions, and batches that have them."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm_example.data import ColumnChoice, DataUnavailableError, multi_hot
from dlrm_example.data import prepare as prepare_module
from dlrm_example.data.multi_hot import Lookups
from dlrm_example.data.prepared import open_prepared
from tests.data.rows import COLUMNS, prepared_rows, raw_rows, write

MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15


def mixed(bits: int) -> int:
    bits = (bits + STEP) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def expected_ids(lookups: Lookups, number: int) -> list[int]:
    """One id at a time."""
    first = number % lookups.num_embeddings
    text = lookups.column.encode()
    salt = mixed(sum((byte + 1) * STEP ** (place + 1) for place, byte in enumerate(text)) + len(text) & MASK)
    state, ids = mixed(first ^ salt), [first]
    for place in range(lookups.size - 1):
        bits = mixed((state + place * STEP) & MASK)
        if lookups.distribution == "uniform":
            ids.append(bits % lookups.num_embeddings)
        else:
            ids.append(math.floor((1 - (bits >> 11) / 2**53) ** -4.0 - 1) % lookups.num_embeddings)
    return ids


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
@pytest.mark.parametrize(("num_embeddings", "size"), [(1, 3), (7, 1), (7, 5), (40_000_000, 100)])
def test_ids_are_those_of_plain_python(distribution: str, num_embeddings: int, size: int) -> None:
    lookups = Lookups(column="cat_20", num_embeddings=num_embeddings, size=size, distribution=distribution)  # type: ignore[arg-type]
    numbers = [0, 1, 6, 7, 12_345, 39_999_999, 2**31 - 1]
    found = lookups.of(torch.tensor(numbers, dtype=torch.int32))
    assert found.tolist() == [each for number in numbers for each in expected_ids(lookups, number)]
    assert lookups.of(torch.zeros(0, dtype=torch.int32)).tolist() == []


def test_uniform_ids_are_spread_evenly_and_differ_between_columns() -> None:
    one, other = (Lookups(column=name, num_embeddings=100, size=21) for name in ("cat_0", "cat_1"))
    numbers = torch.arange(100, dtype=torch.int32)
    drawn = one.of(numbers).reshape(100, 21)[:, 1:]
    counts = np.bincount(drawn.reshape(-1), minlength=100)
    assert ((counts - 20) ** 2 / 20).sum() < 150, "chi-squared of 99 degrees of freedom: 99 on average"
    shared = (drawn == other.of(numbers).reshape(100, 21)[:, 1:]).float().mean()
    assert shared < 0.03, "1% of them by chance"


def test_pareto_ids_follow_its_law() -> None:
    """P(floor(X) < n) = 1 - (1 + n)^-1/4; what leaves the table is spread over it."""
    lookups = Lookups(column="cat_0", num_embeddings=2**30, size=51, distribution="pareto")
    drawn = lookups.of(torch.arange(1000, dtype=torch.int32)).reshape(1000, 51)[:, 1:]
    leaves = 2**30**-0.25
    for bound in (1, 10, 1000):
        expected = 1 - (1 + bound) ** -0.25
        assert abs((drawn < bound).float().mean() - expected) < leaves + 4 * math.sqrt(0.25 / drawn.numel()), bound


def test_counts_are_those_of_every_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_hot, "_CHUNK_IDS", 7)
    lookups = Lookups(column="u", num_embeddings=11, size=3)
    counts = [5, 0, 2, *range(20)]
    expected = Counter(each for number, count in enumerate(counts) for each in expected_ids(lookups, number) * count)
    assert lookups.counts(np.array(counts)).tolist() == [expected[number] for number in range(11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multi_hot")
    write(root / "raw" / "x.parquet", raw_rows(200))
    assert prepare_module.main(["--input", str(root / "raw"), "--out", str(root / "prepared"), *COLUMNS]) == 0
    return root / "prepared"


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_batches_have_them(folder: Path, rank: int, world_size: int) -> None:
    """Of all kinds of columns: one id that stays one, one that becomes several, a list whose ids fit a smaller table."""
    choice = ColumnChoice(sparse=("tags", "u", "i"), num_embeddings=(3, 9, 11), multi_hot_sizes=(1, 4, 1))
    source = open_prepared(folder, choice)
    features = {feature.name: feature for feature in source.info.sparse_features}
    assert {name: each.num_embeddings for name, each in features.items()} == {"u": 9, "i": 11, "tags": 3}
    assert [name for name, each in features.items() if each.multi_hot] == ["u", "tags"]
    assert source.info.count_lookups is not None
    counts = {name: found.sum() for name, found in source.info.count_lookups().items()}
    train = prepared_rows(folder, "train")
    assert counts == {"u": 4 * len(train), "i": len(train), "tags": sum(len(row["tags"]) for row in train)}
    by_number = {row["row"]: row for row in prepared_rows(folder, "val")}
    u = Lookups(column="u", num_embeddings=9, size=4)
    seen = 0
    for batch in source.loader("val", batch_size=5, rank=rank, world_size=world_size).epoch(1):
        ids = {
            key: [bag.tolist() for bag in found.to_dense()] for key, found in batch.sparse_features.to_dict().items()
        }
        for place, label in enumerate(batch.labels.tolist()):
            found = [ids[name][place] for name in ("u", "i", "tags")]
            if label < 0:
                assert found == [[], [0], []], "padding"
                continue
            row = by_number[batch.dense_features[place, 0].item()]
            assert found == [expected_ids(u, row["u"]), [row["i"] % 11], [tag % 3 for tag in row["tags"]]]
            seen += 1
    assert seen == len(range(rank, len(by_number), world_size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_hot_sizes": (2, 2)}, "--multi_hot_sizes has 2 numbers for 3 sparse columns: u, i, tags"),
        ({"num_embeddings": (9,)}, "--num_embeddings_per_feature has 1 numbers for 3 sparse columns"),
        ({"multi_hot_sizes": (1, 1, 2)}, "tags is multi-hot already, so its size must be 1, not 2"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(folder: Path, changes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(DataUnavailableError, match=message):
        open_prepared(folder, replace(ColumnChoice(), **changes))
