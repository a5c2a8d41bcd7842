"""A data set held in memory, and its batches as KeyedJaggedTensors, dealt out over the ranks.

Shape suffixes: N rows of a split, B rows of a batch on this rank, F dense features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_example.data.dataset import PADDING, SPLITS, BatchLoader, DatasetInfo, Split

MOST_NAMED = 8  # rows of a batch


@dataclass(frozen=True)
class InMemoryDataset:
    """Three splits and the description they must fit."""

    info: DatasetInfo
    splits: Mapping[str, Split]

    def __post_init__(self) -> None:
        assert set(self.splits) == set(SPLITS), f"splits are {set(self.splits)}, not {SPLITS}"
        for split in self.splits.values():
            _check_split(split, self.info)

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        limit_batches: int | None = None,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> BatchLoader:
        return InMemoryLoader(
            split=self.splits[split],
            batch_size=batch_size,
            limit_batches=limit_batches,
            shuffle_seed=shuffle_seed,
            rank=rank,
            world_size=world_size,
        )


@dataclass(frozen=True, kw_only=True)
class InMemoryLoader:
    """Cuts an epoch into global batches and hands this rank its share of each.

    All ranks have the same number of batches, of the same sizes: TorchRec's collectives need both. Where a global batch
    cannot be cut evenly, up to `world_size - 1` rows are left out of it when shuffling (others in each epoch); otherwise
    they are all there, and shorter shares are filled up with rows whose label is `PADDING`.
    """

    split: Split
    batch_size: int
    limit_batches: int | None = None
    shuffle_seed: int | None = None
    rank: int = 0
    world_size: int = 1

    def _num_batches(self) -> int:
        return -(-len(self.split) // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        whole = self._num_batches()
        return whole if self.limit_batches is None else min(whole, self.limit_batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        global_batches = torch.tensor_split(self._order(number), self._num_batches())
        for rows in global_batches[start : len(self)]:
            yield self._share(rows)

    def position(self, number: int, batch: int) -> str:
        rows = torch.tensor_split(self._order(number), self._num_batches())[batch].tolist()
        named = ", ".join(map(str, rows[:MOST_NAMED]))
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        return f"batch {batch + 1} of {len(self)}: rows {named}{more} of a split in memory"

    def _share(self, rows: torch.Tensor) -> Batch:
        if self.shuffle_seed is not None:
            rows = rows[: len(rows) - len(rows) % self.world_size]
        mine = rows[self.rank :: self.world_size]
        padding = -(-len(rows) // self.world_size) - len(mine)
        batch = make_batch(self.split, torch.cat([mine, rows[:padding]]))
        batch.labels[len(mine) :] = PADDING
        return batch

    def _order(self, epoch: int) -> torch.Tensor:
        if self.shuffle_seed is None:
            return torch.arange(len(self.split))
        generator = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + epoch)
        return torch.randperm(len(self.split), generator=generator)


def make_batch(split: Split, rows_B: torch.Tensor) -> Batch:
    """The given rows as dense features, one KeyedJaggedTensor (keys in the split's order) and labels."""
    taken = [ids.take(rows_B) for ids in split.sparse.values()]
    sparse = KeyedJaggedTensor(
        keys=list(split.sparse),
        values=torch.cat([values for values, _ in taken]),
        lengths=torch.cat([lengths for _, lengths in taken]),
    )
    return Batch(split.dense_NF[rows_B], sparse, split.labels_N[rows_B])


def _check_split(split: Split, info: DatasetInfo) -> None:
    assert split.dense_NF.shape == (len(split), len(info.dense_names)), split.dense_NF.shape
    assert tuple(split.sparse) == tuple(feature.name for feature in info.sparse_features), list(split.sparse)
    for feature in info.sparse_features:
        ids = split.sparse[feature.name]
        assert len(ids) == len(split), f"{feature.name}: {len(ids)} rows of ids for {len(split)} rows"
        if len(ids.values_T):
            low, high = int(ids.values_T.min()), int(ids.values_T.max())
            inside = low >= 0 and high < feature.num_embeddings
            assert inside, f"{feature.name}: ids {low} to {high} leave the table of {feature.num_embeddings}"
