"""Assignments as bits, and of warm ids only: what is stored, and that nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import (
    CCE,
    PQ,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ResidualCCE,
    recluster,
)
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.encoding import PackedEncoding
from cce_torchrec.native import switched_off
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.vocabulary import Block
from tests.unit.cce_tables import Snapshot, assert_same_state, build, cce_table, state_copy
from tests.unit.oracles import python_block

V = 300


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_values", [1, 2, 3, 8, 9, 255, 257, 1000, 2**16, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 21])
def test_bits_are_those_of_the_numbers(num_values: int, count: int) -> None:
    encoding = PackedEncoding(num_values, count)
    assignments = torch.randint(num_values, (50, count))
    assignments[0], assignments[1] = 0, num_values - 1
    stored = encoding.encode(assignments)
    bits = max(1, (num_values - 1).bit_length())
    for row, expected in zip(stored.tolist(), assignments.tolist(), strict=True):
        text = "".join(f"{value:0{bits}b}" for value in reversed(expected))  # the lowest bits come first
        assert int.from_bytes(bytes(row), "little") == int(text, 2)
        assert len(row) == -(-len(text) // 8)
    assert torch.equal(encoding.decode(stored).long(), assignments)
    assert encoding.decode(stored[:0]).shape == (0, count)


def trained(method: CCE, steps: int = 5) -> tuple[CompressedEmbeddingBagCollection, list[Tensor]]:
    """Trained and re-clustered; the outputs of every step."""
    collection = build(cce_table(V, method=method))
    optimizer = torch.optim.Adam(collection.parameters(), lr=0.01)
    generator, outputs = torch.Generator().manual_seed(0), []
    for step in range(steps):
        ids = torch.randint(V, (64,), generator=generator)
        pooled = collection(KeyedJaggedTensor(["f_t"], ids, lengths=torch.full((16,), 4))).values()
        outputs.append(pooled.detach().clone())
        optimizer.zero_grad()
        mse_loss(pooled, torch.ones_like(pooled)).backward()
        optimizer.step()
        if step % 2:
            recluster(collection, seed=step, optimizer=optimizer, config=ReclusterConfig(optimizer_state="carry"))
    return collection, outputs


METHODS: dict[str, Callable[..., CCE]] = {
    "cce": lambda **fields: CCE(num_rows=12, num_columns=2, **fields),
    "residual": lambda **fields: ResidualCCE(num_rows=9, num_levels=3, num_columns=2, **fields),
    "warm": lambda **fields: CCE(num_rows=12, num_columns=2, num_assigned_ids=100, **fields),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("native", [True, False])
def test_packed_assignments_train_and_cluster_as_plain_ones(name: str, native: bool) -> None:
    def both() -> list[tuple[CompressedEmbeddingBagCollection, list[Tensor]]]:
        return [trained(METHODS[name](bit_packed=packed)) for packed in (False, True)]

    if native:
        (plain, plain_outputs), (packed, packed_outputs) = both()
    else:
        with switched_off():
            (plain, plain_outputs), (packed, packed_outputs) = both()
    # The fused operator, which takes plain assignments only, adds gradients up in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if native else {"rtol": 0, "atol": 0}
    for ours, theirs in zip(packed_outputs, plain_outputs, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(packed.dense_weight("t"), plain.dense_weight("t"), **tolerance)
    ids = torch.arange(V)
    maps = [collection.lowered_tables[0].row_map for collection in (plain, packed)]
    assert torch.equal(maps[0].assigned(ids), maps[1].assigned(ids))
    assert maps[0].has_plain_assignments is (name != "warm")
    assert not maps[1].has_plain_assignments
    before = state_copy(packed)
    other = build(cce_table(V, method=METHODS[name](bit_packed=True, seed=5)), seed=5)
    other.load_state_dict(before)
    assert_same_state(other, before)
    assert torch.equal(other.dense_weight("t"), packed.dense_weight("t"))


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        (CCE(num_rows=1000, num_columns=4), V * 4 * 2),
        (CCE(num_rows=1000, num_columns=4, bit_packed=True), V * 5),  # 4 x 10 bits
        (CCE(num_rows=1025, num_columns=4, bit_packed=True), V * 6),  # 4 x 11 bits, to a byte
        (ResidualCCE(num_rows=5, num_levels=3, num_columns=4, bit_packed=True), V * 3),  # 2 x 4 x 3 bits
        (CCE(num_rows=1000, num_columns=4, num_assigned_ids=50), 50 * (4 + 4 * 2) + 8 * 5),
        (CCE(num_rows=1000, num_columns=4, num_assigned_ids=50, bit_packed=True), 50 * (4 + 5) + 8 * 5),
        (CCE(num_rows=1000, num_columns=4, num_assigned_ids=10 * V), V * (4 + 4 * 2) + 8 * 5),
    ],
)
def test_bytes_are_counted_exactly(method: CCE, stored: int) -> None:
    collection = build(cce_table(V, method=method))
    (table,) = collection.memory_report().tables
    others = 8 * (1 + 4) + 8  # helper coefficients, version
    assert table.assignment_bytes == stored + others
    held = sum(t.numel() * t.element_size() for t in state_copy(collection).values())
    assert held == table.codebook_bytes + table.assignment_bytes


def test_packed_pq_is_pq() -> None:
    torch.manual_seed(0)
    plain, packed = (build(cce_table(V, method=PQ(num_rows=9, num_columns=4, bit_packed=p))) for p in (False, True))
    assert torch.equal(plain.dense_weight("t"), packed.dense_weight("t"))
    assert state_copy(packed)["_row_maps.t.assignments"].shape == (V, 2)  # 4 x 4 bits


def test_a_checkpoint_of_another_storage_is_refused() -> None:
    plain, packed, warm = (
        build(cce_table(V, method=CCE(num_rows=12, num_columns=2, **fields)))
        for fields in ({}, {"bit_packed": True}, {"num_assigned_ids": 30})
    )
    for one, other in ((plain, packed), (packed, plain), (plain, warm), (warm, packed)):
        before = state_copy(one)
        with pytest.raises(ValueError, match="Build the model with the checkpoint's method and sizes"):
            one.load_state_dict(other.state_dict())
        assert_same_state(one, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bit_packed": 1}, "bit_packed=1 is neither True nor False"),
        ({"num_assigned_ids": 0}, "num_assigned_ids=0 is not a positive integer"),
    ],
)
def test_bad_storage(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCE(num_rows=12, **fields)


# --- warm ids --------------------------------------------------------------------------------------------------------


def warm_map(collection: CompressedEmbeddingBagCollection) -> CCERowMap:
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    assert row_map.warm_ids is not None
    return row_map


def warm_ids(collection: CompressedEmbeddingBagCollection) -> list[int]:
    ids = warm_map(collection).warm_ids.tolist()
    return [v for v in ids if v != -1]


def test_before_a_clustering_all_ids_are_hashed_as_without_a_limit() -> None:
    method = CCE(num_rows=12, num_columns=2, initial_assignments="hash")
    limited, plain = (build(cce_table(V, method=replace(method, num_assigned_ids=limit))) for limit in (40, None))
    assert torch.equal(limited.dense_weight("t"), plain.dense_weight("t"))
    assert warm_ids(limited) == []


@pytest.mark.parametrize(("num_rows", "num_columns"), [(12, 2), (7, 4), (V, 2), (V + 5, 1), (1, 2)])
def test_consecutive_ids_begin_in_blocks(num_rows: int, num_columns: int) -> None:
    collection = build(cce_table(V, method=CCE(num_rows=num_rows, num_columns=num_columns)))
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    assert row_map.assigned(torch.arange(V)).T.tolist() == [
        [python_block(v, V, num_rows, Fraction(i, num_columns)) for v in range(V)] for i in range(num_columns)
    ]


def test_what_ids_cannot_begin_with() -> None:
    with pytest.raises(ValueError, match="initial_assignments='random' is not one of blocks, hash"):
        CCE(num_rows=12, initial_assignments="random")  # type: ignore[arg-type]


WEIGHTS = {
    "distinct": (torch.arange(V), list(range(V - 40, V))),
    "ties": (1.0 + (torch.arange(V) % 10 == 0), sorted([*range(0, V, 10), *range(1, 10), 11])),
    "few seen": ((torch.arange(V) % 50 == 7).double(), list(range(7, V, 50))),
    "all alike": (torch.ones(V), list(range(40))),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_ids_of_the_largest_weights_become_warm(name: str) -> None:
    weights, expected = WEIGHTS[name]
    collection = build(cce_table(V, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=40)))
    recluster(collection, seed=0, id_weights={"t": weights})
    assert warm_ids(collection) == expected


def brute_force(
    before: Tensor, collection: CompressedEmbeddingBagCollection, weights: Tensor, warm: list[int]
) -> Tensor:
    """The vectors after a re-clustering, id by id, from the centroids that it found: float64 [V, D]."""
    now = Snapshot.of(collection)
    columns = []
    for column, x_VD in enumerate(before.chunk(2, dim=1)):
        book = now.main[column]
        row_V = torch.zeros(V, dtype=torch.int64)
        for v in warm:
            row_V[v] = int((x_VD[v] - book).square().sum(1).argmin())
        main_VD = book[row_V]
        helper_V = now.helpers_VC[:, column]
        out_VD = main_VD.clone()
        for j in helper_V.unique().tolist():
            mine = helper_V == j
            w = weights[mine, None]
            if float(w.sum()) > 0:
                out_VD[mine] += ((x_VD - main_VD)[mine] * w).sum(0) / w.sum()
        columns.append(out_VD)
    return torch.cat(columns, dim=1)


def test_warm_ids_get_the_nearest_centroid_and_the_others_the_first() -> None:
    weights = (torch.rand(V, generator=torch.Generator().manual_seed(3)) * 9).floor().double()
    collection = build(cce_table(V, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=60)))
    for seed in (1, 2):  # the second time, other ids are warm
        weights = weights.roll(7)
        before = collection.dense_weight("t").double()
        report = recluster(collection, seed=seed, id_weights={"t": weights}).tables[0]
        after, warm = collection.dense_weight("t").double(), warm_ids(collection)
        assert len(warm) == 60
        expected = brute_force(before, collection, weights, warm)
        used = weights > 0
        torch.testing.assert_close(after[used], expected[used], rtol=1e-5, atol=1e-5)
        cold = [v for v in range(V) if v not in warm]
        assert torch.count_nonzero(Snapshot.of(collection).assignments_VC[cold]) == 0
        mean = (before[cold] * weights[cold, None]).sum(dim=0) / weights[cold].sum()
        torch.testing.assert_close(first_rows(collection), mean, rtol=1e-5, atol=1e-6)
        lost = ((before - after).square().sum(1) @ weights) / (before.square().sum(1) @ weights)
        assert report.relative_squared_error == pytest.approx(float(lost), rel=1e-4)


def test_centroids_are_those_of_the_warm_ids_alone() -> None:
    """A table of the warm ids alone, with the vectors they have, has the same K-means objective: 0 for as many rows."""
    collection = build(cce_table(V, method=CCE(num_rows=13, num_columns=2, num_assigned_ids=12)))
    before = collection.dense_weight("t").double()
    weights = torch.zeros(V)
    weights[100:130] = torch.arange(30, 0, -1.0)
    recluster(collection, seed=0, id_weights={"t": weights})
    now = Snapshot.of(collection)
    for book, x_VD in zip(now.main, before.chunk(2, dim=1), strict=True):
        nearest = torch.cdist(x_VD[100:112], book).min(dim=1).values
        torch.testing.assert_close(nearest, torch.zeros(12, dtype=torch.float64), atol=1e-5, rtol=0)


def first_rows(collection: CompressedEmbeddingBagCollection) -> Tensor:
    """Of the main codebooks of all columns, side by side."""
    return torch.cat([book[0] for book in Snapshot.of(collection).main])


def test_cold_ids_that_were_never_seen_share_the_mean_of_the_others() -> None:
    collection = build(cce_table(V, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=30)))
    before = collection.dense_weight("t").double()
    weights = torch.zeros(V)
    weights[100:120] = torch.arange(1.0, 21)
    recluster(collection, seed=0, id_weights={"t": weights})
    mean = (before * weights[:, None]).sum(dim=0) / weights.sum()
    torch.testing.assert_close(first_rows(collection), mean, rtol=1e-5, atol=1e-6)


def test_further_codebooks_leave_the_mean_of_cold_ids_as_it_is() -> None:
    method = ResidualCCE(num_rows=12, num_columns=2, num_levels=3, num_assigned_ids=30)
    collection = build(cce_table(V, method=method))
    before, weights = collection.dense_weight("t").double(), torch.arange(V, 0, -1.0)
    recluster(collection, seed=0, id_weights={"t": weights})
    cold, rows = torch.arange(30, V), collection.lowered_tables[0].row_map.rows(torch.arange(V))
    mean = (before[cold] * weights[cold, None]).sum(dim=0) / weights[cold].sum()
    for column, of_column in enumerate(mean.chunk(2)):
        book = collection.codebook(collection.lowered_tables[0].physical_names[column]).double()
        assert (rows[column, cold, :2] == torch.tensor([0, 12])).all()
        torch.testing.assert_close(book[0], of_column, rtol=1e-5, atol=1e-6)
        assert not book[12].any()


def test_the_only_row_is_everybodys() -> None:
    collection = build(cce_table(V, method=CCE(num_rows=1, num_columns=2, num_assigned_ids=30)))
    before = collection.dense_weight("t").double()
    weights = torch.zeros(V)
    weights[:30] = 1
    recluster(collection, seed=0, id_weights={"t": weights})
    torch.testing.assert_close(first_rows(collection), before[:30].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_mean_over_a_sample_is_near_that_of_all() -> None:
    collection = build(cce_table(20_000, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=30)))
    before, weights = collection.dense_weight("t").double(), 1 / torch.arange(1.0, 20_001)
    recluster(collection, seed=0, id_weights={"t": weights}, config=ReclusterConfig(points_per_centroid=64))
    mean = (before[30:] * weights[30:, None]).sum(dim=0) / weights[30:].sum()
    assert (first_rows(collection) - mean).norm() < 0.2 * before.std(dim=0).norm()
    assert not torch.equal(first_rows(collection), mean)


def test_a_budget_has_no_more_centroids_than_warm_ids() -> None:
    assert CCE.from_budget(V, 8, 100 * 8, num_assigned_ids=60).num_rows == 50
    method = CCE.from_budget(V, 8, 100 * 8, num_assigned_ids=20)
    assert (method.num_rows, method.helper_rows) == (21, 79)
    method = ResidualCCE.from_budget(V, 8, 100 * 8, num_assigned_ids=20)
    assert (method.num_rows, method.helper_rows) == (21, 58)


def test_as_many_slots_as_ids_are_no_limit() -> None:
    vectors = []
    for limit in (None, V):
        method = CCE(num_rows=12, num_columns=2, num_assigned_ids=limit, initial_assignments="hash")
        collection = build(cce_table(V, method=method))
        for seed in (1, 2):
            recluster(collection, seed=seed, id_weights={"t": torch.arange(1, V + 1)})
        vectors.append(collection.dense_weight("t"))
    assert torch.equal(*vectors)


def test_an_id_out_of_bounds_is_refused_as_ever() -> None:
    collection = build(cce_table(V, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=30)))
    with pytest.raises(IndexError, match=f"id {V} is outside"):
        collection(KeyedJaggedTensor(["f_t"], torch.tensor([V]), lengths=torch.tensor([1])))


def test_assignments_of_some_ids_are_not_sharded_by_id() -> None:
    config = CompressedEmbeddingBagConfig(
        name="t",
        num_embeddings=V,
        embedding_dim=8,
        feature_names=["f"],
        method=CCE(num_rows=12, num_columns=2, num_assigned_ids=30),
        assignment_placement="sharded",
    )
    with pytest.raises(ValueError, match="num_assigned_ids=30: assignments of some ids only are not sharded"):
        CompressedEmbeddingBagCollection(tables=[config])


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("warm", [[0], [V - 1], [5, 6, 250], list(range(40)), list(range(V))], ids=str)
def test_spans_of_ranks_have_every_id_once_and_their_own_warm_ids(warm: list[int], world_size: int) -> None:
    everything = []
    for rank in range(world_size):
        collectives = LocalCollectives()
        collectives.rank, collectives.world_size = rank, world_size
        block = Block.of_rank(V, 7, torch.device("cpu"), collectives, torch.tensor(warm))
        span = [v for ids in block.span(V).batches() for v in ids.tolist()]
        assert {v for ids in block.batches() for v in ids.tolist()} == set(span) & set(warm)
        everything += span
    assert everything == list(range(V))
