"""Ids that matter more than others: closed forms and loops."""

import pytest
import torch
from torch import Tensor

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, ReclusterConfig, recluster
from tests.unit.cce_tables import Snapshot, assert_same_state, build, cce_table

pytestmark = pytest.mark.usefixtures("one_thread")

V = 300
SETTLED = ReclusterConfig(num_iterations=200, tolerance=0.0)


def random_weights(seed: int = 0) -> Tensor:
    """Of very different sizes; every tenth id counts for nothing."""
    weights = torch.rand(V, generator=torch.Generator().manual_seed(seed)) ** 4 * 10
    weights[::10] = 0
    return weights


def reclustered(weights: Tensor, config: ReclusterConfig = SETTLED):
    collection = build(cce_table(V))
    before = Snapshot.of(collection)
    (report,) = recluster(collection, seed=7, config=config, id_weights={"t": weights}).tables
    return before, Snapshot.of(collection), report


def four_points(num_embeddings: int) -> CompressedEmbeddingBagCollection:
    """One column of one dim, two main rows and two helper rows: vectors 0, 1, 100 and 101."""
    table = cce_table(num_embeddings, 1, method=CCE(num_rows=2, num_columns=1, num_helper_rows=2))
    collection = build(table)
    with torch.no_grad():
        collection.codebook("t").copy_(torch.tensor([[0.0], [100.0], [0.0], [1.0]]))
    return collection


def by_vector(snapshot: Snapshot, value: float) -> list[int]:
    return [v for v in range(snapshot.num_ids) if float(snapshot.vectors_VD[v, 0]) == value]


def test_integer_weights_are_copies_of_an_id() -> None:
    # 0 and 1 come together, and so do 100 and 101; the centroids are the weighted means of the pairs.
    copies = {0.0: 3, 1.0: 1, 100.0: 2, 101.0: 8}
    few, many = four_points(40), four_points(400)
    weights = {}
    for name, collection in (("few", few), ("many", many)):
        snapshot, weights[name] = Snapshot.of(collection), torch.zeros(len(collection.dense_weight("t")))
        for value, count in copies.items():
            ids = by_vector(snapshot, value)
            if name == "few":
                weights[name][ids[0]] = count  # one id stands for `count`
            else:
                weights[name][ids[:count]] = 1
    for name, collection in (("few", few), ("many", many)):
        recluster(collection, seed=0, config=SETTLED, id_weights={"t": weights[name]})
        centroids = Snapshot.of(collection).main[0].flatten().sort().values
        expected = torch.tensor([(3 * 0 + 1 * 1) / 4, (2 * 100 + 8 * 101) / 10], dtype=torch.float64)
        torch.testing.assert_close(centroids, expected, rtol=1e-6, atol=1e-6)


def test_weights_pull_a_sampled_fit_as_well() -> None:
    # Of 20,000 ids about a quarter have each vector; ids at 101 count 20 times as much as those at 100.
    collection = four_points(20_000)
    snapshot = Snapshot.of(collection)
    weights = torch.ones(20_000)
    weights[by_vector(snapshot, 101.0)] = 20
    recluster(collection, seed=0, config=ReclusterConfig(points_per_centroid=500), id_weights={"t": weights})
    low, high = Snapshot.of(collection).main[0].flatten().sort().values.tolist()
    sizes = {value: len(by_vector(snapshot, value)) for value in (100.0, 101.0)}
    mean = 100 + 20 * sizes[101.0] / (20 * sizes[101.0] + sizes[100.0])
    assert high == pytest.approx(mean, abs=0.03)
    assert 0.2 < low < 0.8


def test_the_sample_estimates_the_weighted_means_without_bias() -> None:
    collection = four_points(20_000)
    snapshot = Snapshot.of(collection)
    weights = torch.ones(20_000)
    weights[by_vector(snapshot, 0.0)] = 3
    config = ReclusterConfig(points_per_centroid=2000)
    recluster(collection, seed=0, config=config, id_weights={"t": weights})
    low = float(Snapshot.of(collection).main[0].min())
    zeros, ones = len(by_vector(snapshot, 0.0)), len(by_vector(snapshot, 1.0))
    assert low == pytest.approx(ones / (3 * zeros + ones), abs=0.03)


def test_centroids_are_weighted_means_and_helpers_weighted_residuals() -> None:
    weights = random_weights()
    before, after, _ = reclustered(weights)
    for column, points in enumerate(before.columns()):
        assigned = after.assignments_VC[:, column]
        for row in range(12):
            members = [v for v in range(V) if int(assigned[v]) == row]
            total = sum(float(weights[v]) for v in members)
            if total > 0:
                mean = sum(points[v] * float(weights[v]) for v in members) / total
                torch.testing.assert_close(after.main[column][row], mean, rtol=1e-4, atol=1e-4)
        for row in range(12):
            members = [v for v in range(V) if int(after.helpers_VC[v, column]) == row]
            residuals = [(points[v] - after.main[column][assigned[v]]) * float(weights[v]) for v in members]
            mean = sum(residuals) / sum(float(weights[v]) for v in members)
            torch.testing.assert_close(after.helper[column][row], mean, rtol=1e-4, atol=1e-5)


def test_the_reported_error_is_weighted() -> None:
    weights = random_weights()
    before, after, report = reclustered(weights)
    errors, energies = ((d**2).sum(dim=1) for d in (before.vectors_VD - after.vectors_VD, before.vectors_VD))
    expected = float((weights.double() * errors).sum() / (weights.double() * energies).sum())
    assert report.relative_squared_error == pytest.approx(expected, rel=1e-4)


def test_heavier_ids_are_kept_better() -> None:
    weights = torch.ones(V)
    weights[:30] = 100
    before, after, _ = reclustered(weights)
    _, plain, _ = reclustered(torch.ones(V))

    def error(snapshot: Snapshot) -> float:
        return float((before.vectors_VD - snapshot.vectors_VD)[:30].square().sum())

    assert error(after) < 0.5 * error(plain)


def test_ids_of_weight_zero_are_assigned_but_pull_nothing() -> None:
    weights = random_weights()
    collection, other = build(cce_table(V)), build(cce_table(V))
    row_map = other.lowered_tables[0].row_map
    row_map.assignments[::10] = (row_map.assignments[::10] + 1) % 12  # those ids lie elsewhere
    before = Snapshot.of(other)
    reports = [recluster(c, seed=7, id_weights={"t": weights}).tables[0] for c in (collection, other)]
    first, second = Snapshot.of(collection), Snapshot.of(other)
    for one, two in zip(first.codebooks, second.codebooks, strict=True):
        torch.testing.assert_close(one, two)
    assert reports[0].relative_squared_error == pytest.approx(reports[1].relative_squared_error)
    for column, points in enumerate(before.columns()):
        nearest = (points[:, None] - second.main[column]).square().sum(dim=2).argmin(dim=1)
        assert torch.equal(nearest, second.assignments_VC[:, column])


def test_as_few_ids_of_weight_as_rows_are_lossless_among_themselves() -> None:
    weights = torch.zeros(V)
    weights[100:112] = torch.rand(12) + 0.1
    before, after, report = reclustered(weights)
    torch.testing.assert_close(after.vectors_VD[100:112], before.vectors_VD[100:112], rtol=0, atol=1e-6)
    assert report.relative_squared_error < 1e-12


def test_equal_weights_change_nothing() -> None:
    plain, scaled = build(cce_table(V)), build(cce_table(V))
    recluster(plain, seed=1)
    recluster(scaled, seed=1, id_weights={"t": torch.full((V,), 4.0)})
    first, second = Snapshot.of(plain), Snapshot.of(scaled)
    assert torch.equal(first.assignments_VC, second.assignments_VC)
    torch.testing.assert_close(first.vectors_VD, second.vectors_VD)


def test_weights_may_be_counts() -> None:
    counts = random_weights().ceil().long()
    as_counts, as_floats = build(cce_table(V)), build(cce_table(V))
    recluster(as_counts, seed=1, id_weights={"t": counts})
    recluster(as_floats, seed=1, id_weights={"t": counts.double()})
    assert_same_state(as_counts, as_floats.state_dict())


def test_weights_of_one_table_leave_the_others_unweighted() -> None:
    tables = [cce_table(V, name="a"), cce_table(V, name="b")]
    plain, weighted = build(*tables), build(*tables)
    recluster(plain, seed=1)
    recluster(weighted, seed=1, id_weights={"a": random_weights()})
    assert torch.equal(Snapshot.of(plain, "b").vectors_VD, Snapshot.of(weighted, "b").vectors_VD)
    assert not torch.equal(Snapshot.of(plain, "a").vectors_VD, Snapshot.of(weighted, "a").vectors_VD)
