"""Streamed batches against the rows of the files: none lost or doubled over ranks, epochs and resumed epochs."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from dlrm_example.data import ColumnChoice, DataUnavailableError, order, prepare, sources, streaming
from dlrm_example.data.dataset import PADDING
from dlrm_example.data.order import EpochOrder, batch_cuts
from dlrm_example.data.prefetch import prefetch
from dlrm_example.data.prepared import PreparedDataset, open_prepared
from tests.data.rows import COLUMNS, Row, prepared_rows, raw_rows, write

NUM_ROWS = 1237


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data in many uneven row groups."""
    root = tmp_path_factory.mktemp("streaming")
    write(root / "raw" / "x.parquet", raw_rows(NUM_ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_ROWS", 150)
        patch.setattr(prepare, "ROW_GROUP_ROWS", 20)
        assert prepare.main(["--input", str(root / "raw"), "--out", str(root / "prepared"), *COLUMNS]) == 0
    return root / "prepared"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BLOCK_ROWS", 200)


def dataset(folder: Path) -> PreparedDataset:
    return open_prepared(folder, ColumnChoice())


def rows_of(batch: Batch) -> list[Row]:
    """What a batch says of its rows, row by row; padding left out."""
    keys = batch.sparse_features.to_dict()
    ids = {key: [row.tolist() for row in jagged.to_dense()] for key, jagged in keys.items()}
    rows = []
    for row, label in enumerate(batch.labels.tolist()):
        number, a = batch.dense_features[row].tolist()
        u, i, tags = (ids[key][row] for key in ("u", "i", "tags"))
        if label == PADDING:
            assert (u, i, tags) == ([0], [0], [])
            continue
        rows.append({"y": label, "row": number, "a": a, "u": u[0], "i": i[0], "tags": tags})
    return rows


def numbers(batches: Iterator[Batch]) -> list[list[float]]:
    """The numbers of each batch's rows."""
    return [[row["row"] for row in rows_of(batch)] for batch in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_row_is_in_one_batch(folder: Path, world_size: int, shuffle_seed: int | None, split: str) -> None:
    expected = {row["row"]: row for row in prepared_rows(folder, split)}
    seen: Counter[float] = Counter()
    sizes = []
    for rank in range(world_size):
        loader = dataset(folder).loader(
            split, batch_size=24, shuffle_seed=shuffle_seed, rank=rank, world_size=world_size
        )
        batches = list(loader.epoch(1))
        assert len(batches) == len(loader)
        sizes.append([len(batch.labels) for batch in batches])
        for batch in batches:
            rows = rows_of(batch)
            assert rows == [expected[row["row"]] for row in rows]
            assert shuffle_seed is None or len(rows) == len(batch.labels), "a training is never padded"
            seen.update(row["row"] for row in rows)
    assert all(of_rank == sizes[0] for of_rank in sizes), "every rank has the same batches, by size"
    assert 1 <= min(sizes[0]) <= max(sizes[0]) <= 24
    left_out = len(expected) % world_size if shuffle_seed is not None else 0
    assert set(seen.values()) == {1}
    assert len(seen) == len(expected) - left_out
    assert seen.keys() <= expected.keys()


def test_order_is_that_of_the_files_without_a_seed(folder: Path) -> None:
    batches = numbers(dataset(folder).loader("train", batch_size=24).epoch(3))
    assert list(itertools.chain(*batches)) == [row["row"] for row in prepared_rows(folder, "train")]


def test_shuffling_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    def shuffled(seed: int, epoch: int) -> list[list[float]]:
        return numbers(dataset(folder).loader("train", batch_size=24, shuffle_seed=seed).epoch(epoch))

    assert shuffled(1, 1) == shuffled(1, 1)
    assert shuffled(1, 1) != shuffled(1, 2)
    assert shuffled(1, 1) != shuffled(2, 1)
    position = {number: place for place, number in enumerate(sorted(itertools.chain(*shuffled(1, 1))))}
    places = np.array([position[number] for number in itertools.chain(*shuffled(1, 1))])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.4
    assert np.abs(np.diff(places)).mean() > len(places) / 20, "neighbours in the files are apart"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(folder: Path, world_size: int) -> None:
    """So a training that goes on with other ranks sees what it would have seen."""
    alone = numbers(dataset(folder).loader("train", batch_size=48, shuffle_seed=3).epoch(2))
    ranks = [
        numbers(
            dataset(folder)
            .loader("train", batch_size=48 // world_size, shuffle_seed=3, rank=rank, world_size=world_size)
            .epoch(2)
        )
        for rank in range(world_size)
    ]
    together = [set(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together[:-1] == [set(batch) for batch in alone[:-1]]
    assert together[-1] <= set(alone[-1])
    assert len(alone[-1]) - len(together[-1]) < world_size


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_an_epoch_may_be_joined_in_the_middle(folder: Path, limit: int | None, shuffle_seed: int | None) -> None:
    for rank in (0, 1):
        loader = dataset(folder).loader(
            "train", batch_size=16, shuffle_seed=shuffle_seed, limit_batches=limit, rank=rank, world_size=2
        )
        whole = numbers(loader.epoch(2))
        assert len(whole) == len(loader)
        for start in range(len(loader) + 1):
            assert numbers(loader.epoch(2, start=start)) == whole[start:]


def test_joining_late_reads_no_earlier_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = dataset(folder).loader("train", batch_size=16, shuffle_seed=3)
    read: list[tuple[str, int]] = []
    real = streaming.StreamingLoader._read_group

    def counted(self: streaming.StreamingLoader, file: streaming.DataFile, group: int) -> pa.Table:
        read.append((file.path, group))
        return real(self, file, group)

    monkeypatch.setattr(streaming.StreamingLoader, "_read_group", counted)
    list(loader.epoch(0))
    everything = read.copy()
    assert len(set(everything)) == len(everything)
    read.clear()
    list(loader.epoch(0, start=len(loader) - 2))
    assert 0 < len(read) < len(everything) / 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_reading(folder: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = streaming.StreamingLoader._read_group

    def counted(self: streaming.StreamingLoader, file: streaming.DataFile, group: int) -> pa.Table:
        read.append(file.row_groups[group])
        return real(self, file, group)

    monkeypatch.setattr(streaming.StreamingLoader, "_read_group", counted)
    for rank in range(world_size):
        list(dataset(folder).loader("train", batch_size=16, shuffle_seed=1, rank=rank, world_size=world_size).epoch(0))
    total = len(prepared_rows(folder, "train"))
    assert total <= sum(read) < 1.6 * total, "only row groups across a border are read twice"


@settings(max_examples=60, deadline=None)
@given(
    group_rows=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    seed=st.none() | st.integers(0, 3),
    world_size=st.integers(1, 5),
)
def test_an_order_has_every_row_once(group_rows: list[int], seed: int | None, world_size: int) -> None:
    epoch = EpochOrder(group_rows=np.array(group_rows), seed=None if seed is None else (seed, 1), world_size=world_size)
    blocks, end, groups = list(epoch.blocks()), 0, []
    for block in blocks:
        assert block.start == end
        end, groups = block.end, [*groups, *block.groups]
        assert block.num_rows == sum(group_rows[group] for group in block.groups)
        rows = epoch.rows_at(block, np.arange(block.start, block.end))
        assert sorted(rows) == list(range(block.num_rows))
    assert sorted(groups) == list(range(len(group_rows)))
    assert end == sum(group_rows)


@given(num_rows=st.integers(1, 5000), batch_size=st.integers(1, 100), world_size=st.integers(1, 9))
def test_cuts_make_batches_of_nearly_one_size(num_rows: int, batch_size: int, world_size: int) -> None:
    sizes = np.diff(batch_cuts(num_rows, batch_size * world_size))
    assert sizes.sum() == num_rows
    assert sizes.min() >= 1
    assert sizes.max() <= batch_size * world_size
    assert len(sizes) == -(-num_rows // (batch_size * world_size))
    if world_size != 9:  # of the numbers up to 9, the only one that is not served
        assert (sizes[:-1] % world_size == 0).all()


def test_columns_may_be_chosen(folder: Path) -> None:
    chosen = open_prepared(folder, ColumnChoice(label="y", dense=("a",), sparse=("tags", "u")))
    assert [feature.name for feature in chosen.info.sparse_features] == ["u", "tags"], "one-hot ones first"
    batch = next(iter(chosen.loader("train", batch_size=8).epoch(0)))
    rows = prepared_rows(folder, "train")[:8]
    assert batch.sparse_features.keys() == ["u", "tags"]
    assert [ids.tolist() for ids in batch.sparse_features["tags"].to_dense()] == [row["tags"] for row in rows]
    assert batch.dense_features.tolist() == [[row["a"]] for row in rows]
    for choice, message in [
        (ColumnChoice(label="z"), "with the label y, not z"),
        (ColumnChoice(dense=("a", "b")), "without the dense columns b; it has row, a"),
        (ColumnChoice(sparse=("w",)), "without the sparse columns w; it has u, i, tags"),
    ]:
        with pytest.raises(DataUnavailableError, match=message):
            open_prepared(folder, choice)


def test_damaged_ids_and_files_are_errors(folder: Path, tmp_path: Path) -> None:
    manifest = dataset(folder).manifest
    file = manifest.splits["val"][0]
    source = PreparedDataset(tmp_path, replace(manifest, splits={"val": (file,)}))
    (tmp_path / "val").mkdir()
    table = pq.read_table(folder / file.path)
    too_large = pa.array(np.full(len(table), 10**6, np.int32))
    pq.write_table(table.set_column(table.schema.get_field_index("u"), "u", too_large), tmp_path / file.path)
    with pytest.raises(DataUnavailableError, match="u: ids 1000000 to 1000000 leave the table of"):
        list(source.loader("val", batch_size=8).epoch(0))
    (tmp_path / file.path).write_bytes(b"PAR1")
    with pytest.raises(DataUnavailableError, match=r"part_000000\.parquet, row group 0"):
        list(source.loader("val", batch_size=8).epoch(0))


def test_prefetching_ends_with_whoever_waits_and_passes_errors_on(folder: Path) -> None:
    before = threading.active_count()
    batches = dataset(folder).loader("train", batch_size=8, shuffle_seed=1).epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before

    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    items = prefetch(failing(), 2)  # type: ignore[arg-type]
    assert next(items) == 1
    with pytest.raises(KeyError, match="lost"):
        next(items)
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_pinned_where_there_is_a_gpu(folder: Path) -> None:
    batch = next(iter(dataset(folder).loader("train", batch_size=8).epoch(0)))
    assert batch.dense_features.is_pinned()
    assert batch.sparse_features.values().is_pinned()
