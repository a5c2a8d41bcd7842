"""A re-clustering against its definition: brute force, explicit loops, float64."""

from collections import Counter

import pytest
import torch
from torchrec.modules.embedding_configs import DataType

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, ReclusterConfig, recluster
from tests.unit.cce_tables import Snapshot, assert_same_state, build, cce_table, state_copy
from tests.unit.oracles import make_kjt

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    CCE(num_rows=12, num_columns=2),
    CCE(num_rows=5, num_columns=4, num_helper_rows=3),
    CCE(num_rows=1, num_columns=1),
    CCE(num_rows=30, num_columns=8, num_helper_rows=1),
    CCE(num_rows=260, num_columns=2, num_helper_rows=7),  # two-byte assignments
]
every_shape = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"k{m.num_rows}-c{m.num_columns}")


def reclustered(method: CCE, **options):
    """A random table before and after, and the report on it."""
    collection = build(cce_table(method=method))
    before = Snapshot.of(collection)
    (report,) = recluster(collection, seed=7, **options).tables
    return before, Snapshot.of(collection), report


@every_shape
def test_every_id_goes_to_its_nearest_centroid(method: CCE) -> None:
    before, after, _ = reclustered(method)
    for column, (points, centroids) in enumerate(zip(before.columns(), after.main, strict=True)):
        for v in range(before.num_ids):
            distances = (points[v] - centroids).square().sum(dim=1)
            assert float(distances[after.assignments_VC[v, column]]) <= float(distances.min()) * (1 + 1e-9) + 1e-15


@every_shape
def test_centroids_are_the_means_of_their_ids_once_settled(method: CCE) -> None:
    config = ReclusterConfig(num_iterations=200, tolerance=0.0)
    before, after, _ = reclustered(method, config=config)  # 300 ids are few enough to be all in the sample
    for column, (points, centroids) in enumerate(zip(before.columns(), after.main, strict=True)):
        for row in range(method.num_rows):
            members = [v for v in range(before.num_ids) if int(after.assignments_VC[v, column]) == row]
            if members:
                mean = sum(points[v] for v in members) / len(members)
                torch.testing.assert_close(centroids[row], mean, rtol=1e-5, atol=1e-5)


@every_shape
def test_helper_rows_are_mean_residuals(method: CCE) -> None:
    before, after, _ = reclustered(method)
    for column, points in enumerate(before.columns()):
        for row, helper in enumerate(after.helper[column]):
            members = [v for v in range(before.num_ids) if int(after.helpers_VC[v, column]) == row]
            residuals = [points[v] - after.main[column][after.assignments_VC[v, column]] for v in members]
            mean = sum(residuals) / len(members) if members else torch.zeros_like(helper)
            torch.testing.assert_close(helper, mean, rtol=1e-4, atol=1e-5)


@every_shape
def test_reported_error_is_that_of_the_dense_tables(method: CCE) -> None:
    before, after, report = reclustered(method)
    error = (before.vectors_VD - after.vectors_VD).square().sum() / before.vectors_VD.square().sum()
    assert report.relative_squared_error == pytest.approx(float(error), rel=1e-4, abs=1e-9)


@every_shape
def test_reported_empty_clusters_are_the_rows_without_ids(method: CCE) -> None:
    _, after, report = reclustered(method)
    used = [len(set(after.assignments_VC[:, column].tolist())) for column in range(method.num_columns)]
    assert report.empty_clusters == method.num_columns * method.num_rows - sum(used)


@every_shape
def test_moved_ids_are_those_that_leave_the_majority_of_their_old_cluster(method: CCE) -> None:
    before, after, report = reclustered(method)
    stayed = 0
    for column in range(method.num_columns):
        new_of_old: dict[int, Counter] = {}
        for old, new in zip(before.assignments_VC[:, column], after.assignments_VC[:, column], strict=True):
            new_of_old.setdefault(int(old), Counter())[int(new)] += 1
        stayed += sum(counts.most_common(1)[0][1] for counts in new_of_old.values())
    assert report.moved_fraction == pytest.approx(1 - stayed / before.assignments_VC.numel())
    assert 0 <= report.moved_fraction <= 1


def test_nothing_moves_where_clusters_are_far_apart_whatever_their_new_numbers() -> None:
    collection = build(cce_table(method=CCE(num_rows=6, num_columns=2)))
    with torch.no_grad():
        for name in ("t:0", "t:1"):
            collection.codebook(name)[:6] = 100 * torch.eye(6, 4) + torch.arange(6)[:, None] * 30
    before = Snapshot.of(collection)
    (report,) = recluster(collection, seed=0).tables
    after = Snapshot.of(collection)
    assert report.moved_fraction == 0
    assert report.relative_squared_error < 1e-3
    pairs = {(int(o), int(n)) for o, n in zip(before.assignments_VC[:, 0], after.assignments_VC[:, 0], strict=True)}
    assert len(pairs) == 6


def test_what_is_looked_up_afterwards_is_the_new_table() -> None:
    collection = build()
    kjt = make_kjt({"f_t": [[3, 3, 299], [], [17]]})
    old = collection(kjt)["f_t"].detach()
    recluster(collection, seed=0)
    dense = collection.dense_weight("t")
    out = collection(kjt)["f_t"].detach()
    torch.testing.assert_close(out, torch.stack([2 * dense[3] + dense[299], torch.zeros(8), dense[17]]))
    assert not torch.allclose(out, old)


def test_parameters_stay_the_same_objects() -> None:
    collection = build()
    before = [(id(parameter), parameter.data_ptr()) for parameter in collection.parameters()]
    recluster(collection, seed=0)
    assert [(id(parameter), parameter.data_ptr()) for parameter in collection.parameters()] == before
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in collection.parameters())


# --- invariants of small and odd sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16], ids=lambda data_type: data_type.name)
@pytest.mark.parametrize(
    ("num_embeddings", "num_rows", "helper_rows"),
    [(12, 12, 12), (3, 50, 50), (1, 1, 1), (1, 5, 2), (40, 40, 3), (39, 40, 200), (20, 300, 1)],
)
def test_no_more_ids_than_rows_is_lossless(
    num_embeddings: int, num_rows: int, helper_rows: int, data_type: DataType
) -> None:
    method = CCE(num_rows=num_rows, num_columns=2, num_helper_rows=helper_rows)
    collection = build(cce_table(num_embeddings, method=method, data_type=data_type))
    before = Snapshot.of(collection)
    config = ReclusterConfig(points_per_centroid=1, decode_batch_size=7)
    for _ in range(3):  # and again, from learned assignments
        (report,) = recluster(collection, seed=0, config=config).tables
        after = Snapshot.of(collection)
        atol = 1e-6 if data_type == DataType.FP32 else 1e-2
        torch.testing.assert_close(after.vectors_VD, before.vectors_VD, rtol=0, atol=atol)
        assert report.relative_squared_error < 1e-12
        used = {(column, int(row)) for column in range(2) for row in after.assignments_VC[:, column]}
        assert report.empty_clusters == 2 * num_rows - len(used)
    assert (report.version, report.moved_fraction) == (3, 0)


@pytest.mark.parametrize(
    ("num_embeddings", "method"),
    [
        (3, CCE(num_rows=50, num_columns=2)),
        (5, CCE(num_rows=2, num_columns=2, num_helper_rows=100)),
        (100, CCE(num_rows=90, num_columns=1, num_helper_rows=300)),
    ],
    ids=["rows", "helper rows", "both"],
)
def test_rows_that_no_id_uses_are_finite(num_embeddings: int, method: CCE) -> None:
    collection = build(cce_table(num_embeddings, method=method))
    for seed in range(3):
        (report,) = recluster(collection, seed=seed).tables
        assert all(parameter.isfinite().all() for parameter in collection.parameters())
        assert 0 <= report.relative_squared_error < 1
        snapshot = Snapshot.of(collection)
        for column, helper in enumerate(snapshot.helper):
            unused = [row for row in range(len(helper)) if row not in snapshot.helpers_VC[:, column].tolist()]
            assert not helper[unused].any()


def test_a_table_of_zeros_or_of_equal_vectors() -> None:
    for value in (0.0, 1.5):
        collection = build()
        with torch.no_grad():
            for parameter in collection.parameters():
                parameter.fill_(value)
        before = Snapshot.of(collection)
        (report,) = recluster(collection, seed=0).tables
        assert torch.equal(Snapshot.of(collection).vectors_VD, before.vectors_VD)
        assert report.relative_squared_error == 0


@pytest.mark.parametrize("points_per_centroid", [256, 4], ids=["all ids", "a sample"])
@pytest.mark.parametrize("batch", [1, 7, 100, 299, 300])
def test_several_decode_batches_give_what_one_gives(batch: int, points_per_centroid: int) -> None:
    whole, cut = build(), build()
    config = {"points_per_centroid": points_per_centroid, "num_iterations": 5}
    report = recluster(whole, seed=3, config=ReclusterConfig(**config)).tables[0]
    other = recluster(cut, seed=3, config=ReclusterConfig(**config, decode_batch_size=batch)).tables[0]
    expected, actual = Snapshot.of(whole), Snapshot.of(cut)
    assert torch.equal(actual.assignments_VC, expected.assignments_VC)
    assert torch.equal(actual.helpers_VC, expected.helpers_VC)
    torch.testing.assert_close(actual.vectors_VD, expected.vectors_VD, rtol=1e-6, atol=1e-6)
    assert other.relative_squared_error == pytest.approx(report.relative_squared_error, rel=1e-6)
    assert (other.moved_fraction, other.empty_clusters) == (report.moved_fraction, report.empty_clusters)


def test_a_sample_is_about_as_large_as_asked_and_assignment_is_exact_all_the_same(monkeypatch) -> None:
    from cce_torchrec.recluster import fit as module

    sizes = []
    real = module.kmeans_steps
    monkeypatch.setattr(
        module, "kmeans_steps", lambda points, *args, **kw: sizes.append(len(points)) or real(points, *args, **kw)
    )
    collection = build(cce_table(20_000, method=CCE(num_rows=8, num_columns=2)))
    before = Snapshot.of(collection)
    recluster(collection, seed=0, config=ReclusterConfig(points_per_centroid=50))
    after = Snapshot.of(collection)
    assert len(sizes) == 2
    assert all(abs(size - 400) < 5 * 20 for size in sizes)  # Poisson
    for column, points in enumerate(before.columns()):
        nearest = torch.cdist(points, after.main[column], compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        assert torch.equal(nearest, after.assignments_VC[:, column])


# --- versions and seeds ----------------------------------------------------------------------------------------------


def test_each_version_has_a_helper_hash_of_its_own() -> None:
    collection = build(cce_table(20_000, method=CCE(num_rows=10, num_columns=2)))
    seen = [Snapshot.of(collection).helpers_VC]
    for version in range(1, 4):
        (report,) = recluster(collection, seed=5).tables
        snapshot = Snapshot.of(collection)
        assert report.version == snapshot.version == version
        for old in seen:  # two independent hashes agree for one id in k' = 10
            agree = float((snapshot.helpers_VC == old).double().mean())
            assert abs(agree - 0.1) < 5 * (0.1 * 0.9 / 40_000) ** 0.5
        seen.append(snapshot.helpers_VC)


def test_columns_are_hashed_independently() -> None:
    collection = build(cce_table(20_000, method=CCE(num_rows=10, num_columns=2)))
    recluster(collection, seed=5)
    helpers = Snapshot.of(collection).helpers_VC
    agree = float((helpers[:, 0] == helpers[:, 1]).double().mean())
    assert abs(agree - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5


def test_same_seed_same_result_and_another_seed_another() -> None:
    runs = [build() for _ in range(3)]
    reports = [recluster(run, seed=seed) for run, seed in zip(runs, (4, 4, 5), strict=True)]
    assert_same_state(runs[0], runs[1].state_dict())
    assert reports[0].tables[0].relative_squared_error == reports[1].tables[0].relative_squared_error
    first, other = Snapshot.of(runs[0]), Snapshot.of(runs[2])
    assert not torch.equal(first.helpers_VC, other.helpers_VC)
    assert not torch.equal(first.assignments_VC, other.assignments_VC)


def test_torchs_random_numbers_are_left_alone() -> None:
    results = []
    for seed in (1, 2):
        collection = build()
        torch.manual_seed(seed)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        recluster(collection, seed=0)
        assert torch.equal(torch.rand(3), expected)
        results.append(state_copy(collection))
    assert_same_state(collection, results[0])


def test_half_precision_codebooks() -> None:
    full, half = build(), build(cce_table(data_type=DataType.FP16))
    with torch.no_grad():
        for name in ("t:0", "t:1"):
            full.codebook(name).copy_(half.codebook(name))
    before = Snapshot.of(half)
    (report,) = recluster(half, seed=0).tables
    recluster(full, seed=0)
    after = Snapshot.of(half)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert torch.equal(after.assignments_VC, Snapshot.of(full).assignments_VC)
    torch.testing.assert_close(after.vectors_VD, Snapshot.of(full).vectors_VD, rtol=0, atol=5e-3)
    error = (before.vectors_VD - after.vectors_VD).square().sum() / before.vectors_VD.square().sum()
    assert report.relative_squared_error == pytest.approx(float(error), rel=1e-3)


# --- several tables --------------------------------------------------------------------------------------------------


def test_tables_do_not_depend_on_their_company_and_others_are_left_alone() -> None:
    alone = build(cce_table(name="b"))
    together = build(cce_table(50, name="a"), cce_table(name="b"), cce_table(30, name="c"))
    with torch.no_grad():
        for name in ("b:0", "b:1"):
            together.codebook(name).copy_(alone.codebook(name))
    model = torch.nn.ModuleDict({"x": together, "y": torch.nn.Sequential(build(cce_table(name="d")))})
    report = recluster(model, seed=1)
    assert [table.table for table in report.tables] == ["a", "b", "c", "d"]
    assert report.seconds == pytest.approx(sum(table.seconds for table in report.tables))
    recluster(alone, seed=1)
    assert torch.equal(Snapshot.of(alone, "b").vectors_VD, Snapshot.of(together, "b").vectors_VD)


def test_nothing_changes_where_one_table_of_one_collection_fails() -> None:
    healthy = build(cce_table(name="healthy"))
    mixed = build(cce_table(name="good"), cce_table(name="bad"))
    mixed.codebook("bad:1").data[3, 0] = float("nan")
    model = torch.nn.ModuleList([healthy, mixed])
    mixed.codebook("bad:1").data[3, 0] = 0.0
    optimizer = torch.optim.Adam(model.parameters())
    model[1](make_kjt({"f_good": [[1]], "f_bad": [[2]]})).values().sum().backward()
    optimizer.step()
    mixed.codebook("bad:1").data[3, 0] = float("nan")
    before, mean = state_copy(model), optimizer.state[mixed.codebook("good:0")]["exp_avg"].clone()
    with pytest.raises(ValueError, match="Table 'bad'"):
        recluster(model, seed=0, optimizer=optimizer)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(optimizer.state[mixed.codebook("good:0")]["exp_avg"], mean)
    mixed.codebook("bad:1").data[3, 0] = 0.0
    assert [table.version for table in recluster(model, seed=0, optimizer=optimizer).tables] == [1, 1, 1]


def test_report_prints_a_line_a_table() -> None:
    report = recluster(build(cce_table(name="a"), cce_table(name="b")), seed=0)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["table", "a", "b", "training"]
    assert f"{report.tables[0].relative_squared_error:.4f}" in lines[1]


# --- the number to beat ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_random_table_keeps_more_than_half_its_energy() -> None:
    torch.manual_seed(0)
    table = cce_table(200_000, 64, method=CCE(num_rows=512, num_columns=4))
    collection = CompressedEmbeddingBagCollection(tables=[table])
    before = collection.dense_weight("t")
    config = ReclusterConfig(num_iterations=25, tolerance=0.0)
    (report,) = recluster(collection, seed=0, config=config).tables
    after = collection.dense_weight("t")
    error = float((before - after).double().square().sum() / before.double().square().sum())
    assert error <= 0.45
    assert report.relative_squared_error == pytest.approx(error, rel=1e-4)
    assert report.empty_clusters == 0
