"""Residual CCE against its formula, against CCE, and its re-clustering against explicit loops over levels."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim import Adagrad

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, ReclusterConfig, ResidualCCE, recluster
from tests.unit.cce_tables import build, cce_table, state_copy
from tests.unit.oracles import make_kjt, python_hash

pytestmark = pytest.mark.usefixtures("one_thread")

V, D = 300, 8
SIZES = [
    ResidualCCE(num_rows=6, num_levels=3, num_columns=2),
    ResidualCCE(num_rows=4, num_levels=5, num_columns=4, num_helper_rows=7),
    ResidualCCE(num_rows=9, num_levels=2, num_columns=1, num_helper_rows=1),
    ResidualCCE(num_rows=1, num_levels=4, num_columns=2),
    ResidualCCE(num_rows=260, num_levels=3, num_columns=2, num_helper_rows=3),  # two-byte assignments
]
every_size = pytest.mark.parametrize("method", SIZES, ids=lambda m: f"k{m.num_rows}-L{m.num_levels}-c{m.num_columns}")


def table(method: CCE, num_embeddings: int = V):
    return cce_table(num_embeddings, D, method=method)


def stored(collection: CompressedEmbeddingBagCollection, method: ResidualCCE) -> list[list[list[int]]]:
    """The assignments of each id in each column, level by level."""
    assignments = collection.state_dict()["_row_maps.t.assignments"].tolist()
    levels = method.num_levels - 1
    return [[row[i * levels : (i + 1) * levels] for i in range(method.num_columns)] for row in assignments]


def helper(collection: CompressedEmbeddingBagCollection, column: int) -> list[int]:
    return collection.lowered_tables[0].row_map.helper_rows(torch.arange(V))[column].tolist()


def parts(collection: CompressedEmbeddingBagCollection, method: ResidualCCE) -> list[list[Tensor]]:
    """The codebooks of each column in float64: its levels, then the hashed one."""
    k, levels = method.num_rows, method.num_levels - 1
    books = [parameter.detach().double() for parameter in collection.parameters()]
    return [[*(book[i * k : (i + 1) * k] for i in range(levels)), book[levels * k :]] for book in books]


@every_size
def test_vectors_add_a_row_of_each_level_and_a_hashed_one(method: ResidualCCE) -> None:
    collection = build(table(replace(method, initial_assignments="hash")))
    state = collection.state_dict()["_row_maps.t.assignments"]
    key = (0, "t", "cce")
    levels = method.num_levels - 1
    hashed = [
        [python_hash(v, method.num_rows, f, *key, "main") for f in range(levels * method.num_columns)] for v in range(V)
    ]
    assert state.tolist() == hashed
    state.copy_(torch.randint(0, method.num_rows, state.shape))
    rows, books = stored(collection, method), parts(collection, method)
    expected = [
        torch.cat(
            [
                sum(of_level[row] for of_level, row in zip(main, rows[v][i], strict=True))
                + hashed_rows[python_hash(v, len(hashed_rows), i, *key, "helper", 0)]
                for i, (*main, hashed_rows) in enumerate(books)
            ]
        )
        for v in range(V)
    ]
    torch.testing.assert_close(collection.dense_weight("t").double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
def test_two_levels_are_cce_to_the_bit(optimizer_state: str) -> None:
    sizes = {"num_rows": 12, "num_columns": 2, "num_helper_rows": 7, "seed": 3}
    tables = [table(CCE(**sizes)), table(ResidualCCE(**sizes, num_levels=2))]
    collections = [build(each) for each in tables]
    config = ReclusterConfig(optimizer_state=optimizer_state, points_per_centroid=10, decode_batch_size=70)
    kjt = make_kjt({"f_t": [[v, (7 * v) % V] for v in range(0, V, 3)]})
    states = []
    for collection in collections:
        optimizer = Adagrad(collection.parameters(), lr=0.1)
        reports = []
        for seed in (0, 1):
            optimizer.zero_grad()
            collection(kjt).values().square().sum().backward()
            optimizer.step()
            (report,) = recluster(collection, seed=seed, config=config, optimizer=optimizer).tables
            reports.append((report.relative_squared_error, report.moved_fraction, report.empty_clusters))
        state = {name: value for name, value in state_copy(collection).items() if " format " not in name}
        states.append((state, [optimizer.state[p]["sum"].clone() for p in collection.parameters()], reports))
    (cce, cce_sums, cce_reports), (residual, residual_sums, residual_reports) = states
    assert cce.keys() == residual.keys()
    assert all(torch.equal(cce[name], residual[name]) for name in cce)
    assert all(torch.equal(one, other) for one, other in zip(cce_sums, residual_sums, strict=True))
    assert cce_reports == residual_reports


def test_two_levels_cost_what_cce_costs() -> None:
    for budget in (16, 17, 24, 100, 999):
        cce = CCE.from_budget(V, D, budget)
        residual = ResidualCCE.from_budget(V, D, budget, num_levels=2)
        assert (cce.num_rows, cce.helper_rows) == (residual.num_rows, residual.helper_rows)
        assert cce.num_params(V, D) == residual.num_params(V, D)


def test_a_budget_is_split_equally_over_the_levels() -> None:
    method = ResidualCCE.from_budget(1000, 16, 16 * 100)
    assert (method.num_levels, method.num_rows, method.helper_rows) == (3, 33, 34)
    assert ResidualCCE.from_budget(1000, 16, 16 * 100, num_levels=4).num_rows == 25
    assert ResidualCCE.from_budget(1000, 16, 16 * 100, num_levels=4, num_helper_rows=10).num_rows == 30
    assert ResidualCCE.from_budget(1000, 16, 16 * 100, num_levels=4, num_hot_ids=20).num_rows == 20


def reclustered(method: ResidualCCE, **options):
    collection = build(table(method))
    before = collection.dense_weight("t").double()
    (report,) = recluster(collection, seed=7, **options).tables
    return collection, before, report


@every_size
@pytest.mark.parametrize("settled", [False, True], ids=["by default", "settled"])
def test_each_level_clusters_what_those_before_it_leave(method: ResidualCCE, settled: bool) -> None:
    options = {"config": ReclusterConfig(num_iterations=300, tolerance=0.0)} if settled else {}
    collection, before, report = reclustered(method, **options)
    rows, books = stored(collection, method), parts(collection, method)
    left_energy = 0.0
    for column, points_VD in enumerate(before.chunk(method.num_columns, dim=1)):
        *main, hashed = books[column]
        left = points_VD.clone()
        for level, centroids in enumerate(main):
            distances = torch.cdist(left, centroids, compute_mode="donot_use_mm_for_euclid_dist")
            own = torch.tensor([rows[v][column][level] for v in range(V)])
            assert bool((distances[torch.arange(V), own] <= distances.amin(dim=1) + 2e-6).all())  # nearest of all
            for row in set(own.tolist()) if settled else ():
                torch.testing.assert_close(centroids[row], left[own == row].mean(dim=0), rtol=1e-4, atol=1e-4)
            left = left - centroids[own]
        of_id = torch.tensor(helper(collection, column))
        for row in range(len(hashed)):
            members = left[of_id == row]
            mean = members.mean(dim=0) if len(members) else torch.zeros_like(hashed[row])
            torch.testing.assert_close(hashed[row], mean, rtol=1e-4, atol=1e-5)
        left_energy += float((left - hashed[of_id]).square().sum())
    after = collection.dense_weight("t").double()
    error = float((before - after).square().sum() / before.square().sum())
    assert report.relative_squared_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert error == pytest.approx(left_energy / float(before.square().sum()), rel=1e-3, abs=1e-9)


def test_empty_clusters_are_counted_at_every_level() -> None:
    method = ResidualCCE(num_rows=50, num_levels=3, num_columns=2)
    collection = build(table(method, num_embeddings=20))
    before = collection.dense_weight("t")
    (report,) = recluster(collection, seed=0).tables
    torch.testing.assert_close(collection.dense_weight("t"), before, rtol=0, atol=1e-6)  # 20 ids, 50 rows: lossless
    assignments = collection.state_dict()["_row_maps.t.assignments"]
    used = sum(len(set(column.tolist())) for column in assignments.T)
    assert report.empty_clusters == 2 * 2 * 50 - used


@every_size
def test_moved_ids_are_those_that_leave_the_majority_of_their_old_row_at_any_level(method: ResidualCCE) -> None:
    collection = build(table(method))
    before = collection.state_dict()["_row_maps.t.assignments"].tolist()
    (report,) = recluster(collection, seed=7).tables
    after = collection.state_dict()["_row_maps.t.assignments"].tolist()
    stayed = 0
    for place in range(len(before[0])):
        new_of_old: dict[int, Counter] = {}
        for old, new in zip(before, after, strict=True):
            new_of_old.setdefault(old[place], Counter())[new[place]] += 1
        stayed += sum(max(counts.values()) for counts in new_of_old.values())
    assert report.moved_fraction == pytest.approx(1 - stayed / (V * len(before[0])))


@pytest.mark.parametrize(("num_rows", "width"), [(6, 1), (257, 2)])
def test_every_level_stores_an_assignment_of_the_narrowest_type(num_rows: int, width: int) -> None:
    collection = build(table(ResidualCCE(num_rows=num_rows, num_levels=4, num_columns=2)))
    assert collection.state_dict()["_row_maps.t.assignments"].shape == (V, 2 * 3)
    (row,) = collection.memory_report().tables
    assert row.assignment_bytes == V * 2 * 3 * width + 8 * (1 + 2) + 8  # and the helper's hash, and the version


def test_more_levels_of_the_same_size_keep_more() -> None:
    errors = []
    for levels in (2, 3, 4):
        collection = build(table(ResidualCCE(num_rows=8, num_levels=levels, num_columns=2)))
        with torch.no_grad():  # vectors that do not depend on the number of levels
            for number, book in enumerate(collection.parameters()):
                book.zero_()[:8] = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
                book[-8:] = torch.randn(8, 4, generator=torch.Generator().manual_seed(9 + number))
        (report,) = recluster(collection, seed=0).tables
        errors.append(report.relative_squared_error)
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


def test_several_decode_batches_give_what_one_gives() -> None:
    whole, cut = (build(table(SIZES[0])) for _ in range(2))
    recluster(whole, seed=3, config=ReclusterConfig(points_per_centroid=20))
    recluster(cut, seed=3, config=ReclusterConfig(points_per_centroid=20, decode_batch_size=7))
    one, other = state_copy(whole), state_copy(cut)
    assert torch.equal(one["_row_maps.t.assignments"], other["_row_maps.t.assignments"])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_carried_optimizer_state_follows_level_by_level() -> None:
    method = ResidualCCE(num_rows=5, num_levels=3, num_columns=2, num_helper_rows=6)
    collection = build(table(method))
    optimizer = Adagrad(collection.parameters(), lr=0.1)
    collection(make_kjt({"f_t": [[v] * (v % 3 + 1) for v in range(V)]})).values().square().sum().backward()
    optimizer.step()
    old = [optimizer.state[book]["sum"].clone() for book in collection.parameters()]
    row_map = collection.lowered_tables[0].row_map
    before_CVR = row_map.rows(torch.arange(V))
    recluster(collection, seed=0, config=ReclusterConfig(optimizer_state="carry"), optimizer=optimizer)
    after_CVR = row_map.rows(torch.arange(V))
    for column, book in enumerate(collection.parameters()):
        inherited: list[list[Tensor]] = [[] for _ in book]
        for v in range(V):
            for place in range(3):
                source = old[column][before_CVR[column, v, place]]
                inherited[int(after_CVR[column, v, place])].append(source)
        expected = torch.stack([torch.stack(x).mean(dim=0) if x else torch.zeros(4) for x in inherited])
        torch.testing.assert_close(optimizer.state[book]["sum"], expected, rtol=1e-5, atol=1e-6)
