"""CCE on circular memory and its re-clustering against their definitions: loops over ids, columns and offsets, float64."""

from unittest import mock

import pytest
import torch

from cce_torchrec import ReclusterConfig, recluster
from cce_torchrec.methods import CCERobe, TableSpec
from cce_torchrec.recluster import windows as windows_module
from cce_torchrec.recluster.windows import nearest_windows
from tests.unit.oracles import python_hash
from tests.unit.window_tables import METHODS, D, Snapshot, V, build, decoder_of, window

pytestmark = pytest.mark.usefixtures("one_thread")

every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def reclustered(method: CCERobe, **options):
    collection = build(method)
    decoder = decoder_of(collection)
    before = Snapshot.of(decoder)
    (report,) = recluster(collection, seed=7, **options).tables
    return before, Snapshot.of(decoder), report


# --- the method ------------------------------------------------------------------------------------------------------


@every_method
def test_vectors_and_gradients_are_those_of_the_formula(method: CCERobe) -> None:
    decoder = decoder_of(build(method)).double()
    reference, helper = (m.detach().clone().requires_grad_() for m in (decoder.memory, decoder.helper))
    ids, width = torch.tensor([3, 89, 3, 0]), D // method.num_columns
    expected = []
    for number in ids.tolist():
        for column in range(method.num_columns):
            main_at = python_hash(number, method.num_cells, column, 0, "t", "cce_robe", "main")
            helper_at = python_hash(number, method.helper_cells, column, 0, "t", "cce_robe", "helper", 0)
            expected.append(window(reference, main_at, width) + window(helper, helper_at, width))
    vectors, oracle = decoder(ids), torch.cat(expected).view(len(ids), D)
    torch.testing.assert_close(vectors, oracle, rtol=0, atol=0)
    upstream = torch.randn(len(ids), D, dtype=torch.float64)
    vectors.backward(upstream)
    oracle.backward(upstream)
    torch.testing.assert_close(decoder.memory.grad, reference.grad)
    torch.testing.assert_close(decoder.helper.grad, helper.grad)


def test_offsets_take_the_narrowest_integers_and_are_counted() -> None:
    for cells, dtype, size in ((256, torch.uint8, 1), (257, torch.int16, 2), (32769, torch.int32, 4)):
        decoder = decoder_of(build(CCERobe(num_cells=cells, num_columns=2)))
        assert decoder.offsets.dtype == dtype
        assert decoder.stored_bytes() == V * 2 * size + 3 * 8 + 8


def test_elements_start_with_the_std_of_the_table() -> None:
    spec = TableSpec(name="t", num_embeddings=20_000, embedding_dim=D, std=0.25, dtype=torch.float32, device=None)
    vectors = CCERobe(num_cells=30_000, num_columns=2).decoder(spec)(torch.arange(20_000)).detach()
    assert float(vectors.std()) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CCERobe(num_cells=3, num_columns=2), "num_cells=3 .*works is 4,"),
        (CCERobe(num_cells=9, num_columns=2, num_helper_cells=2), "num_helper_cells=2 .*works is 4,"),
        (CCERobe(num_cells=9, num_columns=3), "num_columns=3 .* 2 and 4"),
    ],
    ids=str,
)
def test_what_cannot_work_is_named(method: CCERobe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(method)


def test_budgets() -> None:
    assert CCERobe.from_budget(V, 64, 1001) == CCERobe(num_cells=501, num_helper_cells=500, num_columns=8)
    assert CCERobe.from_budget(V, 64, 9) == CCERobe(num_cells=5, num_helper_cells=4, num_columns=16)
    for num_embeddings in (10, 10**4, 10**7):
        for dim in (4, 7, 33, 128):
            budget = num_embeddings * dim // 10
            method = CCERobe.from_budget(num_embeddings, dim, budget)
            assert method.num_params(num_embeddings, dim) == budget


def test_sharded_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="'cce_robe' decodes where the ids are: leave it 'replicated'"):
        build(METHODS[0], assignment_placement="sharded")


# --- its re-clustering -----------------------------------------------------------------------------------------------


@every_method
def test_every_column_goes_to_its_nearest_window_at_any_offset(method: CCERobe) -> None:
    before, after, _ = reclustered(method)
    candidates = torch.stack([window(after.memory, offset, after.width) for offset in range(method.num_cells)])
    is_aligned = []
    for v in range(V):
        for column in range(method.num_columns):
            distances = (before.column(v, column) - candidates).square().sum(dim=1)
            chosen = after.offsets[v][column]
            assert float(distances[chosen]) <= float(distances.min()) * (1 + 1e-6) + 1e-15
            is_aligned.append(chosen % after.width == 0)
    assert all(is_aligned) == (after.width == 1)


@every_method
def test_helper_cells_are_mean_residuals(method: CCERobe) -> None:
    before, after, _ = reclustered(method)
    residuals: list[list[float]] = [[] for _ in range(method.helper_cells)]
    for v in range(V):
        for column in range(method.num_columns):
            left = before.column(v, column) - window(after.memory, after.offsets[v][column], after.width)
            for cell, value in enumerate(left.tolist()):
                residuals[(after.helper_offsets[v][column] + cell) % method.helper_cells].append(value)
    expected = [sum(values) / len(values) if values else 0.0 for values in residuals]
    torch.testing.assert_close(after.helper, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@every_method
def test_the_reported_error_is_that_of_the_vectors(method: CCERobe) -> None:
    before, after, report = reclustered(method)
    error = (before.vectors() - after.vectors()).square().sum() / before.vectors().square().sum()
    assert report.relative_squared_error == pytest.approx(float(error), rel=1e-4, abs=1e-9)
    assert report.version == 1


@every_method
def test_empty_clusters_are_centroids_where_no_window_starts(method: CCERobe) -> None:
    _, after, report = reclustered(method)
    used = {offset for offsets in after.offsets for offset in offsets}
    aligned = range(0, method.num_cells // after.width * after.width, after.width)
    assert report.empty_clusters == sum(offset not in used for offset in aligned)


def test_the_memory_holds_centroids_of_all_columns_that_no_move_improves() -> None:
    """At a fixed point of Lloyd's iterations, every centroid is the mean of the points nearest to it."""
    before, after, _ = reclustered(METHODS[0], config=ReclusterConfig(num_iterations=200, tolerance=0.0))
    centroids = after.memory[:48].view(12, 4)
    points = before.vectors().view(-1, 4)
    nearest = [int((point - centroids).square().sum(dim=1).argmin()) for point in points]
    for row, centroid in enumerate(centroids):
        members = [point for point, at in zip(points, nearest, strict=True) if at == row]
        if members:
            torch.testing.assert_close(centroid, sum(members) / len(members), rtol=1e-5, atol=1e-5)
    assert torch.equal(after.memory[48:], torch.zeros(2, dtype=torch.float64))


def test_more_windows_than_distinct_columns_lose_nothing() -> None:
    before, after, report = reclustered(CCERobe(num_cells=V * D, num_columns=2))
    assert report.relative_squared_error < 1e-10
    torch.testing.assert_close(after.vectors(), before.vectors(), rtol=1e-5, atol=1e-6)


def test_any_offset_beats_aligned_offsets_and_the_helper_beats_none() -> None:
    before, after, report = reclustered(METHODS[0])
    centroids = after.memory[:48].view(12, 4)
    points = before.vectors().view(-1, 4)
    aligned = sum(float((point - centroids).square().sum(dim=1).min()) for point in points) / float(
        points.square().sum()
    )
    assert report.relative_squared_error < aligned < 1


def test_a_second_clustering_of_what_was_clustered_loses_less() -> None:
    collection = build(METHODS[1])
    errors = [recluster(collection, seed=seed).tables[0].relative_squared_error for seed in (1, 2)]
    assert errors[1] < errors[0] < 1
    assert int(decoder_of(collection).version) == 2


@every_method
def test_batches_and_weights_of_one_change_nothing(method: CCERobe) -> None:
    _, whole, _ = reclustered(method)
    _, batched, _ = reclustered(method, config=ReclusterConfig(decode_batch_size=7), id_weights={"t": torch.ones(V)})
    assert whole.offsets == batched.offsets
    torch.testing.assert_close(whole.vectors(), batched.vectors(), rtol=1e-6, atol=1e-7)


def test_heavy_ids_are_kept_best() -> None:
    weights = torch.ones(V)
    weights[:5] = 1e6
    before, after, report = reclustered(METHODS[1], id_weights={"t": weights})
    squared = (before.vectors() - after.vectors()).square().sum(dim=1)
    assert float(squared[:5].mean()) < 0.5 * float(squared[5:].mean())
    weighted = float(squared @ weights.double()) / float(before.vectors().square().sum(dim=1) @ weights.double())
    assert report.relative_squared_error == pytest.approx(weighted, rel=1e-3)


def test_nearest_windows_over_several_tiles() -> None:
    memory = torch.randn(50)
    memory[20:24] = memory[0:4]  # equals: the lowest offset wins
    points = torch.cat([torch.randn(40, 4), memory[20:24][None], torch.cat([memory[48:], memory[:2]])[None]])
    candidates = torch.stack([window(memory, offset, 4) for offset in range(50)])
    expected = [(point - candidates).double().square().sum(dim=1).argmin() for point in points]
    for tile in (1, 7, 50, 1000):
        with mock.patch.object(windows_module, "_WINDOWS_AT_ONCE", tile):
            offsets, distances = nearest_windows(points, memory)
        assert offsets.tolist() == expected
        torch.testing.assert_close(distances, (points - candidates[offsets]).square().sum(dim=1))
    assert offsets[-2:].tolist() == [0, 48]
