"""The MovieLens features and splits against plain loops over the raw files."""

import hashlib
import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from dlrm_example.data.dataset import SPLITS, JaggedIds
from dlrm_example.data.memory import InMemoryDataset
from dlrm_example.data.movielens import build_dataset, load_movielens_100k
from dlrm_example.data.movielens_archive import GENRES, GROUPLENS, RECBOLE, load_raw
from tests.example.archives import data_folder, grouplens_zip, recbole_rows

Row = tuple[int, int, int, int]  # user, item, timestamp, label


@pytest.fixture(scope="module")
def dataset() -> InMemoryDataset:
    return load_movielens_100k(Path(data_folder()))


def interactions() -> dict[int, list[Row]]:
    """Each user's rows in time order, by the definition."""
    by_user: dict[int, list[Row]] = defaultdict(list)
    for user, item, rating, timestamp in recbole_rows("inter"):
        if rating != "3":
            by_user[int(user) - 1].append((int(user) - 1, int(item) - 1, int(timestamp), int(int(rating) >= 4)))
    return {user: sorted(rows, key=lambda row: row[2]) for user, rows in by_user.items()}


def expected_splits(discard_last: int) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for _, rows in sorted(interactions().items()):
        kept = rows[: len(rows) - discard_last]
        if len(kept) < 3:
            splits["train"] += kept
        else:
            splits["train"] += kept[:-2]
            splits["val"].append(kept[-2])
            splits["test"].append(kept[-1])
    return splits


def ids_of(ids: JaggedIds) -> list[list[int]]:
    offsets, values = ids.offsets_N1.tolist(), ids.values_T.tolist()
    return [values[start:end] for start, end in pairwise(offsets)]


@pytest.mark.parametrize("discard_last", [0, 2])
def test_labels_and_leave_last_out_split(discard_last: int) -> None:
    dataset = build_dataset(load_raw(Path(data_folder())), discard_last=discard_last)
    for name, rows in expected_splits(discard_last).items():
        split = dataset.splits[name]
        assert split.sparse["user"].values_T.tolist() == [row[0] for row in rows]
        assert split.sparse["item"].values_T.tolist() == [row[1] for row in rows]
        assert split.labels_N.tolist() == [row[3] for row in rows]


def test_users_with_too_few_interactions_only_train() -> None:
    raw = load_raw(Path(data_folder()))
    user, item = [1, 1, 2, 2, 2, 3], [1, 2, 1, 2, 3, 1]
    ratings = pa.table({"user": user, "item": item, "rating": [5, 1, 4, 2, 5, 3], "timestamp": [5, 4, 1, 1, 1, 9]})
    small = build_dataset(replace(raw, ratings=ratings))
    pairs = {
        name: list(zip(split.sparse["user"].values_T.tolist(), split.sparse["item"].values_T.tolist(), strict=True))
        for name, split in small.splits.items()
    }
    assert pairs == {"train": [(0, 1), (0, 0), (1, 0)], "val": [(1, 1)], "test": [(1, 2)]}  # ties stay in file order


def test_user_and_film_features(dataset: InMemoryDataset) -> None:
    users, items = recbole_rows("user"), recbole_rows("item")
    bands = ((0, 17), (18, 24), (25, 34), (35, 44), (45, 49), (50, 55), (56, 200))
    occupations, zips = sorted({row[3] for row in users}), sorted({row[4] for row in users})
    split = dataset.splits["test"]
    columns = {name: ids_of(ids) for name, ids in split.sparse.items()}
    years_by_code: dict[int, set[str]] = defaultdict(set)
    for row in range(0, len(split), 3):
        _, age, gender, occupation, zip_code = users[columns["user"][row][0]]
        _, _, year, genres = items[columns["item"][row][0]]
        assert columns["gender"][row] == [int(gender == "F")]
        (band,) = columns["age_band"][row]
        assert bands[band][0] <= int(age) <= bands[band][1]
        assert columns["occupation"][row] == [occupations.index(occupation)]
        assert columns["zip"][row] == [zips.index(zip_code)]
        assert columns["genres"][row] == sorted(GENRES.index(genre) for genre in genres.split(" "))
        years_by_code[columns["release_year"][row][0]].add(year)
    assert all(len(years) == 1 for years in years_by_code.values())
    sizes = {feature.name: feature.num_embeddings for feature in dataset.info.sparse_features}
    assert sizes == {
        **{"user": 943, "item": 1682, "gender": 2, "age_band": 7, "occupation": 21, "zip": len(zips)},
        **{"release_year": 72, "genres": 19},
    }


def test_dense_features_know_only_the_training_past(dataset: InMemoryDataset) -> None:
    rows = expected_splits(0)
    users = recbole_rows("user")
    unscaled: dict[str, dict[str, list[float]]] = {name: {"age": [], "user": [], "item": []} for name in SPLITS}
    moments: dict[tuple[str, int], list[int]] = defaultdict(list)
    for user, item, timestamp, _ in rows["train"]:
        moments["user", user].append(timestamp)
        moments["item", item].append(timestamp)
    for name in SPLITS:
        for user, item, timestamp, _ in rows[name]:
            unscaled[name]["age"].append(float(users[user][1]))
            for key in (("user", user), ("item", item)):
                earlier = sum(moment < timestamp for moment in moments[key])
                unscaled[name][key[0]].append(math.log1p(earlier))
    for column, name in (("age", "age"), ("log_user_history", "user"), ("log_item_history", "item")):
        train = torch.tensor(unscaled["train"][name], dtype=torch.float64)
        for split in SPLITS:
            expected = (torch.tensor(unscaled[split][name]) - train.mean()) / train.std(correction=0)
            found = dataset.splits[split].dense_NF[:, dataset.info.dense_names.index(column)]
            torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def test_features_do_not_depend_on_held_out_labels() -> None:
    """Turning every held-out rating round changes labels only."""
    raw = load_raw(Path(data_folder()))
    before = build_dataset(raw)
    held_out = {(row[0] + 1, row[1] + 1) for name in ("val", "test") for row in expected_splits(0)[name]}
    columns = raw.ratings.to_pydict()
    pairs = zip(columns["user"], columns["item"], columns["rating"], strict=True)
    columns["rating"] = [6 - rating if (user, item) in held_out else rating for user, item, rating in pairs]
    after = build_dataset(replace(raw, ratings=pa.table(columns)))
    for name in SPLITS:
        assert torch.equal(before.splits[name].dense_NF, after.splits[name].dense_NF)
    assert torch.equal(before.splits["val"].labels_N, 1 - after.splits["val"].labels_N)


def test_both_publishers_give_the_same_data_set(dataset: InMemoryDataset, tmp_path: Path) -> None:
    content = grouplens_zip()
    (tmp_path / GROUPLENS.file_name).write_bytes(content)
    source = replace(GROUPLENS, digest="sha256", expected=hashlib.sha256(content).hexdigest())
    other = build_dataset(load_raw(tmp_path, (source, RECBOLE)))
    assert other.info == dataset.info
    for name in SPLITS:
        ours, theirs = dataset.splits[name], other.splits[name]
        assert torch.equal(ours.dense_NF, theirs.dense_NF)
        assert torch.equal(ours.labels_N, theirs.labels_N)
        for feature, ids in ours.sparse.items():
            assert torch.equal(ids.values_T, theirs.sparse[feature].values_T), feature
            assert torch.equal(ids.offsets_N1, theirs.sparse[feature].offsets_N1), feature
