"""Ids and rows beyond 2^31, of which a rank holds a small block: nothing the size of the vocabulary is allocated."""

import pytest
import torch

from cce_torchrec import CCE, CompressedEmbeddingBagConfig, FullTable, ReclusterConfig
from cce_torchrec.lowering import LoweredTable, lower_tables
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native.build import find_compiler
from cce_torchrec.planner.perf import sent
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import TableState
from cce_torchrec.recluster.vocabulary import Block, moved_sample
from cce_torchrec.simulate.work import recluster_work

V, BLOCK = 10**10, 200_000
CPU, META = torch.device("cpu"), torch.device("meta")
METHOD = CCE(num_rows=30, num_columns=2, num_helper_rows=77)
MASK = 2**64 - 1


class LastOfMany(LocalCollectives):
    """The last of so many ranks that its share is the last block; the others have nothing to say."""

    world_size = V // BLOCK
    rank = world_size - 1

    def is_mine(self, number: int) -> bool:
        return True


def last_block() -> CCERowMap:
    row_map = METHOD.row_map("t", V, 8, META)
    assert isinstance(row_map, CCERowMap)
    row_map.keep_block(V - BLOCK, V, CPU)
    return row_map


def hashed_by_hand(id_: int, coefficients: list[int], num_rows: int) -> list[int]:
    """In Python's integers, which do not overflow."""
    word = (id_ ^ coefficients[0]) & MASK
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = ((word ^ (word >> shift)) * multiplier) & MASK
    word ^= word >> 31
    return [((((word * c) & MASK) >> 32) * num_rows) >> 32 for c in coefficients[1:]]


def test_rows_of_the_last_ids() -> None:
    row_map, ids = last_block(), [V - 1, V - BLOCK, V - 500]
    rows_CNR = row_map.rows(torch.tensor(ids))
    assert row_map.helper_coefficients is not None
    helper = row_map.helper_coefficients.tolist()
    for place, id_ in enumerate(ids):
        width = -(-V // 30)
        assert rows_CNR[:, place, 0].tolist() == [(id_ + shift) // width % 30 for shift in (0, width // 2)]
        assert rows_CNR[:, place, 1].tolist() == [30 + row for row in hashed_by_hand(id_, helper, 77)]


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_rows_that_a_kernel_writes() -> None:
    row_map, ids_N = last_block(), torch.arange(V - BLOCK, V)
    values_M = torch.empty(4 * BLOCK, dtype=torch.int64)
    assert row_map.write_rows(ids_N, values_M, [0, 2 * BLOCK])
    assert torch.equal(values_M.view(2, BLOCK, 2), row_map.rows(ids_N))


def test_a_reclustering_of_the_last_block() -> None:
    """Assignments are the nearest centroids of what those ids meant; checked by brute force."""
    row_map = last_block()
    drawn = torch.Generator().manual_seed(0)
    books = [torch.randn(column.num_rows, column.dim, generator=drawn) for column in row_map.columns]
    none = [book.new_zeros(len(book), 0) for book in books]
    state = TableState(
        name="t", row_map=row_map, rows=row_map.rows, codebooks=books, optimizer_state=none, weights_V=None
    )
    ids_N = torch.arange(V - BLOCK, V)
    before = [book[rows_NR].sum(1) for book, rows_NR in zip(books, row_map.rows(ids_N), strict=True)]
    new = recluster_table(
        state, seed=1, config=ReclusterConfig(num_iterations=2, decode_batch_size=65_536), collectives=LastOfMany()
    )
    assert new.assignments.shape == (BLOCK, 2)
    for column, (points_ND, book) in enumerate(zip(before, new.codebooks, strict=True)):
        nearest_N = torch.cdist(points_ND.double(), book[:30].double()).argmin(1)
        assert torch.equal(new.assignments[:, column].long(), nearest_N)


def test_a_rank_without_ids() -> None:
    """Of 500,000 ids, 1,024 ranks have 489 each, and the last one none."""
    last = Block(500_000, 500_000, 1000, CPU)
    assert moved_sample(500_000, last).tolist() == []
    assert moved_sample(500_000, Block(0, 20, 1000, CPU)).tolist() == [0, 7, 14]


def full_table() -> LoweredTable:
    config = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=8, feature_names=["f"], method=FullTable()
    )
    (table,) = lower_tables([config], [META])
    return table


def test_what_is_sent_of_rows_that_no_int32_holds() -> None:
    table, W, B = full_table(), 8, 64
    of_all = sent("row_wise", (V // W, 8), table, W, B, B)
    assert of_all.ids == (W - 1) * B * 8 + (W - 1) / W * B * 8
    assert of_all.vectors == (W - 1) * B * 2 * 8 * 4


def test_work_is_counted_in_integers_of_any_size() -> None:
    row_map = METHOD.row_map("t", V, 8, META)
    assert isinstance(row_map, CCERowMap)
    work = recluster_work(row_map, ReclusterConfig(), 3, "cuda", is_sharded=True)
    assert work.ids == 3_333_333_334
    assert work.assign_distances == 3_333_333_334 * 2 * 30
