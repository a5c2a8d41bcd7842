"""Clicks of users on items: MovieLens-100K with its ratings, and Gowalla with drawn negatives; and how they are split.

Two splits: "report" is the one whose numbers are published; "tune" never sees its held-out rows. What is held out for
tuning is cut from the training part of "report" in the same way.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlrm_example.data.download import cache_folder
from dlrm_example.data.movielens_archive import load_raw

Split = Literal["report", "tune"]
DATASETS = ("ml-100k", "gowalla")
NEGATIVES_SEED = 0
TUNE_SEED = 1
NUMBERS_SEED = 2


@dataclass(frozen=True)
class Rows:
    """N clicks that were or were not made: int64 [N], int64 [N], float32 [N] of 0 and 1."""

    users_N: Tensor
    items_N: Tensor
    labels_N: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Rows":
        return Rows(self.users_N[index], self.items_N[index], self.labels_N[index])

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Clicks:
    """What is trained on, and what is held out."""

    num_users: int
    num_items: int
    train: Rows
    held_out: Rows


def load(dataset: str, split: Split, path: str | None) -> Clicks:
    """Read a data set.

    Args:
        dataset: one of ``DATASETS``.
        split: "report" or "tune".
        path: of MovieLens' cache folder (``None``: the user's), or of Gowalla's zip.
    """
    if dataset == "ml-100k":
        return _movielens(split, cache_folder(path))
    if dataset == "gowalla":
        if path is None:
            raise ValueError("gowalla is not fetched: say with --gowalla where its zip is.")
        return _gowalla(split, Path(path))
    raise ValueError(f"dataset={dataset!r} is not one of {DATASETS}.")


def renumbered(clicks: Clicks) -> Clicks:
    """The same clicks, users and items numbered at random."""
    generator = torch.Generator().manual_seed(NUMBERS_SEED)
    user_V, item_V = (torch.randperm(size, generator=generator) for size in (clicks.num_users, clicks.num_items))
    train, held_out = (
        Rows(user_V[rows.users_N], item_V[rows.items_N], rows.labels_N) for rows in (clicks.train, clicks.held_out)
    )
    return Clicks(clicks.num_users, clicks.num_items, train, held_out)


def _movielens(split: Split, folder: Path) -> Clicks:
    """Ratings but those of 3; a click is a rating of 4 or 5. The last two of each user by time are held out."""
    ratings = load_raw(folder).ratings
    user_N, item_N, rating_N, time_N = (ratings[c].to_numpy() for c in ("user", "item", "rating", "timestamp"))
    kept = rating_N != 3
    users, user_N = np.unique(user_N[kept], return_inverse=True)
    items, item_N = np.unique(item_N[kept], return_inverse=True)
    rows = _rows(user_N, item_N, rating_N[kept] >= 4)
    from_end_N = _place_from_end(user_N, time_N[kept])
    skip = 0 if split == "report" else 2
    held_out_N = torch.from_numpy((from_end_N >= skip) & (from_end_N < skip + 2))
    return Clicks(len(users), len(items), rows[torch.from_numpy(from_end_N >= skip + 2)], rows[held_out_N])


def _place_from_end(user_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
    """How many of the user's rows are later than each row; ties in file order."""
    order = np.lexsort((np.arange(len(user_N)), time_N, user_N))
    ends = np.searchsorted(user_N[order], user_N[order], side="right")
    place_N = np.empty_like(order)
    place_N[order] = ends - 1 - np.arange(len(order))
    return place_N


def _gowalla(split: Split, path: Path) -> Clicks:
    """Check-ins, and one item for each, drawn evenly among those where the user never was."""
    with zipfile.ZipFile(path) as archive:
        pairs = [_read_pairs(archive, f"Data/gowalla/gowalla.{part}.inter") for part in ("train", "test")]
    everything_N2 = np.concatenate(pairs)
    num_users, num_items = (int(n) for n in everything_N2.max(axis=0) + 1)
    negative_N = draw_negatives(everything_N2, num_items, NEGATIVES_SEED)
    users_N, items_N = everything_N2.T
    positives = _rows(users_N, items_N, np.ones(len(users_N)))
    negatives = _rows(users_N, negative_N, np.zeros(len(users_N)))
    training = slice(0, len(pairs[0]))
    if split == "report":
        train, held_out = (slice(0, len(pairs[0])), slice(len(pairs[0]), None))
        return Clicks(num_users, num_items, _both(positives, negatives, train), _both(positives, negatives, held_out))
    generator = torch.Generator().manual_seed(TUNE_SEED)
    is_held_out_N = torch.rand(len(pairs[0]), generator=generator) < 0.2  # the published split's share
    positives, negatives = positives[training], negatives[training]
    return Clicks(
        num_users,
        num_items,
        _both(positives, negatives, ~is_held_out_N),
        _both(positives, negatives, is_held_out_N),
    )


def _read_pairs(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    return np.loadtxt(io.BytesIO(archive.read(name)), dtype=np.int64, skiprows=1)


def draw_negatives(pairs_N2: np.ndarray, num_items: int, seed: int) -> np.ndarray:
    """For each pair an item that the user has no pair with: int64 [N]."""
    random = np.random.default_rng(seed)
    users_N = pairs_N2[:, 0]
    known = np.unique(users_N * num_items + pairs_N2[:, 1])
    negative_N = random.integers(num_items, size=len(users_N))
    while True:
        clash_N = np.flatnonzero(np.isin(users_N * num_items + negative_N, known))
        if not len(clash_N):
            return negative_N
        negative_N[clash_N] = random.integers(num_items, size=len(clash_N))


def _rows(users_N: np.ndarray, items_N: np.ndarray, labels_N: np.ndarray) -> Rows:
    return Rows(
        torch.from_numpy(users_N.astype(np.int64)),
        torch.from_numpy(items_N.astype(np.int64)),
        torch.from_numpy(labels_N.astype(np.float32)),
    )


def _both(positives: Rows, negatives: Rows, index: Tensor | slice) -> Rows:
    first, second = positives[index], negatives[index]
    pairs = ((a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    return Rows(*(torch.cat(pair) for pair in pairs))
