"""MovieLens-100K as click prediction: who likes which film, from eight categorical fields and five dense features.

Label: rating >= 4; ratings of 3 are dropped. Each user's second-to-last interaction (by time; ties in file order) is
validation, the last one test, everything before is training.

No feature of a row knows more than the training part held before that row's moment: histories are counted over training
rows that are strictly earlier, and the means and deviations used for scaling are those of the training rows.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dlrm_example.data.dataset import DatasetInfo, JaggedIds, SparseFeature, Split
from dlrm_example.data.memory import InMemoryDataset
from dlrm_example.data.movielens_archive import GENRES, UNKNOWN_YEAR, RawMovieLens, load_raw

AGE_BAND_STARTS = (18, 25, 35, 45, 50, 56)
MIN_INTERACTIONS = 3  # of a user who takes part in validation and test
SECONDS_A_DAY = 86_400

Columns = dict[str, np.ndarray]


def load_movielens_100k(folder: Path, *, discard_last: int = 0) -> InMemoryDataset:
    """The data set, fetched into `folder` where it is not there yet.

    Args:
        folder: where the archive lies or shall lie.
        discard_last: throw away this many of each user's last interactions before anything else. With 2, validation
            and test of the reported split are out of sight: what is chosen there can be reported on the usual split.
    """
    return build_dataset(load_raw(folder), discard_last=discard_last)


def build_dataset(raw: RawMovieLens, *, discard_last: int = 0) -> InMemoryDataset:
    rows = _drop_last(_labelled_rows(raw), discard_last)
    masks = _split_masks(rows["user"])
    sparse, features = _sparse_features(raw, rows)
    dense = _standardised(_dense_features(raw, rows, masks["train"]), masks["train"])
    info = DatasetInfo(name="movielens_100k", sparse_features=features, dense_names=tuple(dense))
    dense_NF = torch.from_numpy(np.stack(list(dense.values()), axis=1).astype(np.float32))
    labels = torch.from_numpy(rows["label"])
    return InMemoryDataset(info, {name: _split(dense_NF, sparse, labels, mask) for name, mask in masks.items()})


def _labelled_rows(raw: RawMovieLens) -> Columns:
    """User and item (from 0), timestamp and label of every rating but the 3s, by user and then time."""
    user, item, rating, timestamp = (raw.ratings[name].to_numpy() for name in ("user", "item", "rating", "timestamp"))
    kept = np.flatnonzero(rating != 3)
    kept = kept[np.lexsort((timestamp[kept], user[kept]))]  # a stable sort: ties stay in file order
    label = (rating[kept] >= 4).astype(np.int64)
    return {"user": user[kept] - 1, "item": item[kept] - 1, "timestamp": timestamp[kept], "label": label}


def _from_the_end(user: np.ndarray) -> np.ndarray:
    """How many rows of the same user follow, in an array sorted by user."""
    ends = np.cumsum(np.bincount(user))
    return ends[user] - 1 - np.arange(len(user))


def _drop_last(rows: Columns, count: int) -> Columns:
    kept = _from_the_end(rows["user"]) >= count
    return {name: column[kept] for name, column in rows.items()}


def _split_masks(user: np.ndarray) -> dict[str, np.ndarray]:
    position = _from_the_end(user)
    takes_part = np.bincount(user)[user] >= MIN_INTERACTIONS
    val, test = takes_part & (position == 1), takes_part & (position == 0)
    return {"train": ~(val | test), "val": val, "test": test}


def _sparse_features(raw: RawMovieLens, rows: Columns) -> tuple[dict[str, JaggedIds], tuple[SparseFeature, ...]]:
    """The ids of every row by feature, and what the features are."""
    user, item = rows["user"], rows["item"]
    occupation, num_occupations = _codes(raw.users["occupation"])
    zip_code, num_zips = _codes(raw.users["zip"])
    known_years, year = np.unique(raw.years, return_inverse=True)
    ids_and_sizes = {
        "user": (user, len(raw.users)),
        "item": (item, len(raw.years)),
        "gender": (pc.equal(raw.users["gender"], "F").to_numpy().astype(np.int64)[user], 2),
        "age_band": (np.searchsorted(AGE_BAND_STARTS, raw.users["age"].to_numpy(), side="right")[user], 7),
        "occupation": (occupation[user], num_occupations),
        "zip": (zip_code[user], num_zips),
        "release_year": (year[item], len(known_years)),
    }
    sparse = {name: JaggedIds.one_per_row(torch.from_numpy(ids)) for name, (ids, _) in ids_and_sizes.items()}
    sparse["genres"] = _multi_hot(raw.genres, item)
    features = [SparseFeature(name=name, num_embeddings=size) for name, (_, size) in ids_and_sizes.items()]
    features.append(SparseFeature(name="genres", num_embeddings=len(GENRES), multi_hot=True))
    return sparse, tuple(features)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Each value's place in the sorted list of values, and how many values there are."""
    values, codes = np.unique(column.to_numpy().astype(str), return_inverse=True)
    return codes, len(values)


def _multi_hot(matrix: np.ndarray, picked: np.ndarray) -> JaggedIds:
    """The columns that are set in the picked rows of a 0/1 matrix."""
    rows, columns = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    of_matrix = JaggedIds(torch.from_numpy(columns), torch.from_numpy(offsets))
    return of_matrix.of_rows(torch.from_numpy(picked))


def _dense_features(raw: RawMovieLens, rows: Columns, train: np.ndarray) -> Columns:
    """Unscaled; NaN where a value is not known."""
    timestamp = rows["timestamp"]
    years = np.where(raw.years == UNKNOWN_YEAR, np.nan, raw.years)[rows["item"]]
    year_of_row = 1970 + timestamp / (365.2425 * SECONDS_A_DAY)
    return {
        "age": raw.users["age"].to_numpy()[rows["user"]].astype(float),
        "log_user_history": np.log1p(_earlier(rows["user"], timestamp, train)),
        "log_item_history": np.log1p(_earlier(rows["item"], timestamp, train)),
        "log_user_days": np.log1p(_seconds_since_first(rows["user"], timestamp) / SECONDS_A_DAY),
        "film_age": year_of_row - years,
    }


def _earlier(key: np.ndarray, timestamp: np.ndarray, train: np.ndarray) -> np.ndarray:
    """How many training rows of the same key are strictly earlier."""
    start = np.int64(timestamp.min())
    span = np.int64(timestamp.max()) - start + 1
    moments = key * span + (timestamp - start)  # orders by key, then time
    known = np.sort(moments[train])
    return np.searchsorted(known, moments) - np.searchsorted(known, key * span)


def _seconds_since_first(user: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Rows are sorted by user and time, so a user's first row is the earliest."""
    first = np.searchsorted(user, user)
    return timestamp - timestamp[first]


def _standardised(columns: Columns, train: np.ndarray) -> Columns:
    """Mean 0 and deviation 1 over the training rows; what is not known becomes the mean."""

    def scaled(column: np.ndarray) -> np.ndarray:
        deviation = np.nanstd(column[train])
        return np.nan_to_num((column - np.nanmean(column[train])) / (deviation if deviation > 0 else 1.0))

    return {name: scaled(column) for name, column in columns.items()}


def _split(dense_NF: torch.Tensor, sparse: Mapping[str, JaggedIds], labels: torch.Tensor, mask: np.ndarray) -> Split:
    rows = torch.from_numpy(np.flatnonzero(mask))
    sparse_part = {name: ids.of_rows(rows) for name, ids in sparse.items()}
    return Split(dense_NF=dense_NF[rows], sparse=sparse_part, labels_N=labels[rows])
