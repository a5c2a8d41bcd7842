"""Batches against rows made by hand, and how they are dealt out over ranks."""

from collections import Counter

import pytest
import torch

from dlrm_example.data.dataset import PADDING, DatasetInfo, JaggedIds, SparseFeature, Split
from dlrm_example.data.memory import InMemoryDataset, make_batch

GENRES_OF_ROW = [[0, 2], [], [1], [2, 0, 1], [1, 1]]
USER_OF_ROW = [4, 3, 2, 1, 0]


def jagged(rows: list[list[int]]) -> JaggedIds:
    lengths = torch.tensor([0] + [len(row) for row in rows])
    return JaggedIds(torch.tensor([value for row in rows for value in row]), lengths.cumsum(0))


def five_rows() -> Split:
    dense = torch.arange(10.0).reshape(5, 2)
    sparse = {"user": JaggedIds.one_per_row(torch.tensor(USER_OF_ROW)), "genres": jagged(GENRES_OF_ROW)}
    return Split(dense_NF=dense, sparse=sparse, labels_N=torch.tensor([0, 1, 0, 1, 1]))


def test_batch_has_the_rows_asked_for() -> None:
    batch = make_batch(five_rows(), torch.tensor([3, 1, 0, 3]))
    assert batch.sparse_features.keys() == ["user", "genres"]
    users, genres = (batch.sparse_features[key].to_dense() for key in ("user", "genres"))
    assert [row.tolist() for row in users] == [[1], [3], [4], [1]]
    assert [row.tolist() for row in genres] == [[2, 0, 1], [], [0, 2], [2, 0, 1]]
    assert batch.dense_features.tolist() == [[6, 7], [2, 3], [0, 1], [6, 7]]
    assert batch.labels.tolist() == [1, 1, 0, 1]


def test_rows_of_a_jagged_feature() -> None:
    part = jagged(GENRES_OF_ROW).of_rows(torch.tensor([4, 1, 0]))
    assert (part.values_T.tolist(), part.offsets_N1.tolist()) == ([1, 1, 0, 2], [0, 2, 2, 4])
    assert len(part) == 3


def numbered(num_rows: int) -> InMemoryDataset:
    ids = JaggedIds.one_per_row(torch.arange(num_rows))
    split = Split(dense_NF=torch.zeros(num_rows, 1), sparse={"row": ids}, labels_N=torch.zeros(num_rows).long())
    feature = SparseFeature(name="row", num_embeddings=num_rows)
    info = DatasetInfo(name="numbered", sparse_features=(feature,), dense_names=("nothing",))
    return InMemoryDataset(info, {"train": split, "val": split, "test": split})


@pytest.mark.parametrize("num_rows", [7, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle_seed", [None, 5])
def test_rows_are_dealt_out_evenly(num_rows: int, world_size: int, shuffle_seed: int | None) -> None:
    dataset = numbered(num_rows)
    seen: Counter[int] = Counter()
    sizes = []
    for rank in range(world_size):
        loader = dataset.loader("val", batch_size=8, shuffle_seed=shuffle_seed, rank=rank, world_size=world_size)
        batches = list(loader.epoch(3))
        assert len(batches) == len(loader)
        sizes.append([len(batch.labels) for batch in batches])
        for batch in batches:
            seen.update(batch.sparse_features.values()[batch.labels != PADDING].tolist())
            if shuffle_seed is not None:
                assert (batch.labels != PADDING).all()
    assert all(of_rank == sizes[0] for of_rank in sizes), "every rank has the same batches, by size"
    assert 1 <= min(sizes[0]) <= max(sizes[0]) <= 8
    left_out = len(sizes[0]) * (world_size - 1) if shuffle_seed is not None else 0
    assert set(seen.values()) == {1}
    assert num_rows - left_out <= len(seen) <= num_rows


def order(dataset: InMemoryDataset, seed: int | None, epoch: int) -> list[int]:
    batches = dataset.loader("train", batch_size=8, shuffle_seed=seed).epoch(epoch)
    return [row for batch in batches for row in batch.sparse_features.values().tolist()]


def test_shuffling_is_a_function_of_seed_and_epoch() -> None:
    dataset = numbered(50)
    assert order(dataset, 1, 1) == order(dataset, 1, 1)
    assert order(dataset, 1, 1) != order(dataset, 1, 2)
    assert order(dataset, 1, 1) != order(dataset, 2, 1)
    assert order(dataset, None, 1) == list(range(50))


def test_limit_batches() -> None:
    loader = numbered(50).loader("train", batch_size=8, limit_batches=2)
    assert len(loader) == len(list(loader.epoch(0))) == 2


@pytest.mark.parametrize("limit", [None, 5])
def test_an_epoch_may_be_joined_in_the_middle(limit: int | None) -> None:
    loader = numbered(101).loader("train", batch_size=8, shuffle_seed=3, limit_batches=limit)
    whole = [batch.sparse_features.values().tolist() for batch in loader.epoch(2)]
    for start in (0, 1, 4, len(loader)):
        assert [batch.sparse_features.values().tolist() for batch in loader.epoch(2, start=start)] == whole[start:]
