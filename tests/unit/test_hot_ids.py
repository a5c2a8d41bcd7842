"""Hot ids, which have rows of their own: what is looked up, what a re-clustering does with them, and what they take."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    ReclusterConfig,
    ResidualCCE,
    recluster,
    record_gradients,
)
from cce_torchrec.memory import stored_bytes
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native import switched_off
from tests.unit.cce_tables import build, cce_table

V, DIM, HOT = 300, 8, 20
METHODS = {
    "cce": CCE(num_rows=12, num_columns=2, num_hot_ids=HOT),
    "packed": CCE(num_rows=12, num_columns=2, num_hot_ids=HOT, bit_packed=True),
    "warm": CCE(num_rows=12, num_columns=2, num_hot_ids=HOT, num_assigned_ids=90),
    "residual": ResidualCCE(num_rows=9, num_columns=2, num_levels=3, num_hot_ids=HOT),
    "uneven": CCE(num_rows=250, num_columns=4, num_helper_rows=3, num_hot_ids=HOT),
}
every_method = pytest.mark.parametrize("name", METHODS)


def row_map_of(collection: CompressedEmbeddingBagCollection) -> CCERowMap:
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    return row_map


def books(collection: CompressedEmbeddingBagCollection) -> list[Tensor]:
    names = collection.lowered_tables[0].physical_names
    return [collection.codebook(name).detach().double() for name in names]


def main_rows(method: CCE) -> int:
    return method.num_assigned * method.num_rows


def own_vectors(collection: CompressedEmbeddingBagCollection, method: CCE) -> Tensor:
    """R times the rows between the main ones and the hashed ones: [HOT, DIM]."""
    first = main_rows(method)
    return (method.num_assigned + 1) * torch.cat([book[first : first + HOT] for book in books(collection)], dim=1)


def shared_vectors(collection: CompressedEmbeddingBagCollection, method: CCE, ids_N: Tensor) -> Tensor:
    """By the equation, of ids that are not hot: [N, DIM]."""
    row_map, levels = row_map_of(collection), method.num_assigned
    mains_AN, helpers_CN = row_map.main_rows(ids_N), row_map.helper_rows(ids_N)
    columns = []
    for column, book in enumerate(books(collection)):
        vectors_ND = book[main_rows(method) + HOT + helpers_CN[column]]
        for level in range(levels):
            vectors_ND = vectors_ND + book[level * method.num_rows + mains_AN[column * levels + level]]
        columns.append(vectors_ND)
    return torch.cat(columns, dim=1)


@contextmanager
def lookups_by(native: bool) -> Iterator[None]:
    if native:
        yield
    else:
        with switched_off():
            yield


def looked_up(collection: CompressedEmbeddingBagCollection, ids_N: Tensor) -> Tensor:
    features = KeyedJaggedTensor(["f_t"], ids_N, lengths=torch.ones(len(ids_N), dtype=torch.int64))
    return collection(features)["f_t"]


@every_method
@pytest.mark.parametrize("native", [True, False])
def test_vectors_before_and_after_a_clustering(name: str, native: bool) -> None:
    method = METHODS[name]
    collection = build(cce_table(V, DIM, method=method))
    weights_V = torch.rand(V, generator=torch.Generator().manual_seed(7))
    hot_H = torch.arange(HOT)
    with lookups_by(native):
        for seed in (1, 2):
            cold_N = torch.tensor(sorted(set(range(V)) - set(hot_H.tolist())))
            found_VD = looked_up(collection, torch.arange(V)).double()
            torch.testing.assert_close(found_VD[hot_H], own_vectors(collection, method))
            torch.testing.assert_close(found_VD[cold_N], shared_vectors(collection, method, cold_N))
            weights_V = weights_V.roll(5)
            recluster(collection, seed=seed, id_weights={"t": weights_V})
            hot_H = weights_V.sort(descending=True).indices[:HOT].sort().values


@every_method
@pytest.mark.parametrize("native", [True, False])
def test_gradients_are_those_of_the_equation(name: str, native: bool) -> None:
    method = METHODS[name]
    collection = build(cce_table(V, DIM, method=method))
    recluster(collection, seed=1, id_weights={"t": torch.rand(V)})
    ids_N, target_ND = torch.randperm(V)[:150], torch.randn(150, DIM)
    hot_H = row_map_of(collection).main_rows(ids_N)[0] >= method.num_rows
    assert 0 < int(hot_H.sum()) < 150
    with lookups_by(native):
        (looked_up(collection, ids_N) * target_ND).sum().backward()
    row_map = row_map_of(collection)
    mains_AN, helpers_CN = row_map.main_rows(ids_N), row_map.helper_rows(ids_N)
    for column, name_of in enumerate(collection.lowered_tables[0].physical_names):
        book = collection.codebook(name_of)
        expected = torch.zeros_like(book, dtype=torch.float64)
        gradients_ND = target_ND.chunk(method.num_columns, dim=1)[column].double()
        levels = method.num_assigned
        for n, gradient_D in enumerate(gradients_ND):
            if mains_AN[0, n] >= method.num_rows:
                expected[main_rows(method) + mains_AN[0, n] - method.num_rows] += (levels + 1) * gradient_D
                continue
            for level in range(levels):
                expected[level * method.num_rows + mains_AN[column * levels + level, n]] += gradient_D
            expected[main_rows(method) + HOT + helpers_CN[column, n]] += gradient_D
        found = book.grad.to_dense() if book.grad.is_sparse else book.grad
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@every_method
def test_hot_ids_keep_their_vectors_and_the_others_are_clustered_without_them(name: str) -> None:
    method = METHODS[name]
    collection = build(cce_table(V, DIM, method=method))
    weights_V = torch.rand(V, generator=torch.Generator().manual_seed(3)).double() + 0.1
    for seed in (1, 2):  # the second time, other ids are hot
        weights_V = weights_V.roll(7)
        hot_H = weights_V.sort(descending=True).indices[:HOT].sort().values
        before = collection.dense_weight("t").double()
        report = recluster(collection, seed=seed, id_weights={"t": weights_V}).tables[0]
        after, row_map = collection.dense_weight("t").double(), row_map_of(collection)
        torch.testing.assert_close(after[hot_H], before[hot_H], rtol=1e-6, atol=1e-6)
        assert torch.equal((row_map.main_rows(torch.arange(V))[0] >= method.num_rows).nonzero().view(-1), hot_H)
        lost = ((before - after).square().sum(1) @ weights_V) / (before.square().sum(1) @ weights_V)
        assert report.relative_squared_error == pytest.approx(float(lost), rel=1e-4)

        is_cold_V = torch.ones(V, dtype=torch.bool)
        is_cold_V[hot_H] = False
        left_VD = before - after  # by rows of the helper, the weighted mean of what is left is 0
        for column, helpers_V in enumerate(row_map.helper_rows(torch.arange(V))):
            for row in helpers_V.unique().tolist():
                mine_V = is_cold_V & (helpers_V == row)
                mean_D = (left_VD.chunk(method.num_columns, dim=1)[column] * weights_V[:, None])[mine_V].sum(dim=0)
                torch.testing.assert_close(mean_D, torch.zeros_like(mean_D), atol=1e-4, rtol=0)


def test_centroids_are_those_of_the_others_alone() -> None:
    """As many rows as ids that are not hot: K-means leaves nothing of these, as it could not if hot ids were among them."""
    collection = build(cce_table(32, DIM, method=CCE(num_rows=12, num_columns=2, num_hot_ids=HOT)))
    before = collection.dense_weight("t")
    report = recluster(collection, seed=0, id_weights={"t": torch.arange(1.0, 33.0)}).tables[0]
    assert report.relative_squared_error < 1e-9
    torch.testing.assert_close(collection.dense_weight("t"), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cce", "warm", "residual"])
@pytest.mark.parametrize("seen", [HOT, HOT // 2])
def test_all_that_matter_are_hot(name: str, seen: int) -> None:
    collection = build(cce_table(V, DIM, method=METHODS[name]))
    before = collection.dense_weight("t")
    report = recluster(collection, seed=0, id_weights={"t": (torch.arange(V) < seen).double()}).tables[0]
    assert report.relative_squared_error < 1e-9
    torch.testing.assert_close(collection.dense_weight("t")[:seen], before[:seen], rtol=1e-6, atol=1e-6)
    assert bool(collection.dense_weight("t").isfinite().all())


def test_more_hot_ids_than_ids() -> None:
    collection = build(cce_table(10, DIM, method=METHODS["cce"]))
    before = collection.dense_weight("t")
    recluster(collection, seed=0)
    torch.testing.assert_close(collection.dense_weight("t"), before, rtol=1e-6, atol=1e-6)


def test_optimizer_state_goes_along() -> None:
    """A hot row has the mean state of the rows that its id had, which is the row's own where the id was hot before."""
    method = CCE(num_rows=12, num_columns=2, num_hot_ids=HOT)
    collection = build(cce_table(V, DIM, method=method))
    optimizer = torch.optim.Adam(collection.parameters(), lr=0.01)
    looked_up(collection, torch.arange(V)).square().sum().backward()
    optimizer.step()
    names, row_map = collection.lowered_tables[0].physical_names, row_map_of(collection)
    before = [optimizer.state[collection.codebook(name)]["exp_avg_sq"].clone() for name in names]
    ids_N = torch.tensor([3, 150])  # hot all along, and hot from now on
    mains_CN, helpers_CN = row_map.main_rows(ids_N), row_map.helper_rows(ids_N)
    weights_V = torch.ones(V)
    weights_V[[*range(1, HOT), 150]] = 9
    config = ReclusterConfig(optimizer_state="carry")
    recluster(collection, seed=1, config=config, optimizer=optimizer, id_weights={"t": weights_V})
    rows_N = row_map.main_rows(ids_N)[0]
    assert rows_N.tolist() == [12 + 2, 12 + 19]
    for column, name in enumerate(names):
        after = optimizer.state[collection.codebook(name)]["exp_avg_sq"]
        torch.testing.assert_close(after[rows_N[0]], before[column][12 + 3])
        mean_D = (before[column][mains_CN[column, 1]] + before[column][12 + HOT + helpers_CN[column, 1]]) / 2
        torch.testing.assert_close(after[rows_N[1]], mean_D)


@pytest.mark.parametrize(
    ("method", "assignment_bytes"),
    [
        (CCE(num_rows=200, num_columns=4, num_hot_ids=56), V * 4),
        (CCE(num_rows=200, num_columns=4, num_hot_ids=57), V * 4 * 2),  # 257 values, above a byte
        (CCE(num_rows=200, num_columns=4, num_hot_ids=57, bit_packed=True), V * 5),  # 4 x 9 bits
    ],
)
def test_what_is_counted(method: CCE, assignment_bytes: int) -> None:
    table = build(cce_table(V, DIM, method=method)).memory_report().tables[0]
    assert table.num_params == (200 + 200 + method.num_hot_ids) * DIM == method.num_params(V, DIM)
    hashes = 8 * 5 + 8  # coefficients and version
    assert table.assignment_bytes == assignment_bytes + hashes
    assert stored_bytes(method, V, DIM) == 4 * table.num_params + assignment_bytes + hashes


def test_a_checkpoint_remembers_who_is_hot() -> None:
    method = METHODS["cce"]
    collection = build(cce_table(V, DIM, method=method))
    recluster(collection, seed=1, id_weights={"t": torch.rand(V)})
    other = build(cce_table(V, DIM, method=method), seed=5)
    other.load_state_dict(collection.state_dict())
    assert torch.equal(other.dense_weight("t"), collection.dense_weight("t"))
    with pytest.raises((ValueError, RuntimeError), match="num_hot_ids"):
        build(cce_table(V, DIM, method=CCE(num_rows=12, num_columns=2))).load_state_dict(collection.state_dict())


def test_a_budget_has_room_for_them() -> None:
    method = CCE.from_budget(V, DIM, 60 * DIM, num_hot_ids=20)
    assert (method.num_rows, method.num_helper_rows, method.num_params(V, DIM)) == (20, 20, 60 * DIM)
    with pytest.raises(ValueError, match=f"smallest possible is {22 * DIM}"):
        CCE.from_budget(V, DIM, 21 * DIM, num_hot_ids=20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hot_ids": -1}, "num_hot_ids=-1 is not an integer of 0 or more"),
        ({"num_hot_ids": 1.5}, "num_hot_ids=1.5"),
        ({"num_hot_ids": 5, "num_assigned_ids": 4}, "num_assigned_ids=4 is below num_hot_ids=5"),
        ({"num_hot_ids": 2**31 - 5}, "above"),
    ],
)
def test_bad_numbers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCE(num_rows=12, num_columns=2, **fields)


@pytest.mark.parametrize("name", ["cce", "warm"])
def test_without_weights_those_are_hot_on_which_the_loss_depends(name: str) -> None:
    collection = build(cce_table(V, DIM, method=METHODS[name]))
    assert row_map_of(collection).main_rows(torch.arange(V))[0, :HOT].tolist() == list(range(12, 12 + HOT))
    record_gradients(collection)
    important_N = torch.arange(HOT) * 4 + 3  # of the first 90 ids, which get slots
    size_V = torch.full((V,), 0.1)
    size_V[important_N] = 2.0
    (looked_up(collection, torch.arange(V)) * size_V[:, None]).sum(dim=1).mean().backward()
    recluster(collection, seed=1)
    hot_H = (row_map_of(collection).main_rows(torch.arange(V))[0] >= 12).nonzero().view(-1)
    assert torch.equal(hot_H, important_N)
