"""PQ, and fitting tables to trained full ones: every number from the assignments alone, by loops and brute force."""

import dataclasses
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import (
    CCE,
    CE,
    PQ,
    QR,
    Bloom,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressionRule,
    FullTable,
    HashingTrick,
    ReclusterConfig,
    ResidualCCE,
    compress,
    recluster,
)
from cce_torchrec.methods import MethodConfig
from tests.unit.cce_tables import assert_same_state, state_copy
from tests.unit.oracles import make_kjt, pool, python_hash

pytestmark = pytest.mark.usefixtures("one_thread")

V, D = 300, 8
SETTLED = ReclusterConfig(num_iterations=300, tolerance=0.0)
FITTED = [
    PQ(num_rows=12, num_columns=2),
    PQ(num_rows=270, num_columns=4),  # two-byte assignments
    PQ(num_rows=1, num_columns=1),
    CCE(num_rows=12, num_columns=2, num_helper_rows=5),
    ResidualCCE(num_rows=6, num_levels=4, num_columns=2),
]
every_method = pytest.mark.parametrize("method", FITTED, ids=lambda m: f"{m.key}-k{m.num_rows}")


def full(num_embeddings: int = V, **fields: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=D, feature_names=["f"], init_fn=nn.init.normal_, **fields
    )


def trained(*tables: EmbeddingBagConfig) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(tables=list(tables) or [full()])


def fitted(method: MethodConfig, **options: Any) -> tuple[Tensor, CompressedEmbeddingBagCollection]:
    """The trained table in float64, and what was made of it."""
    collection = trained()
    before = collection.embedding_bags["t"].weight.detach().double()
    compressed = compress(collection, {"t": method}, from_trained=True, **options)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    return before, compressed


def assignments(collection: CompressedEmbeddingBagCollection) -> Tensor:
    return collection.state_dict()["_row_maps.t.assignments"].long()


def squared_error(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().sum())


# --- the method ------------------------------------------------------------------------------------------------------


def test_pq_concatenates_an_assigned_row_a_column_and_has_nothing_else() -> None:
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=D, feature_names=["f"], method=PQ(num_rows=7, num_columns=2, seed=4)
    )
    collection = CompressedEmbeddingBagCollection(tables=[table])
    books = [parameter.detach() for parameter in collection.parameters()]
    assert [book.shape for book in books] == [(7, 4), (7, 4)]
    hashed = [[python_hash(v, 7, i, 4, "t", "pq", "main") for i in range(2)] for v in range(V)]
    assert assignments(collection).tolist() == hashed
    state = collection.state_dict()
    assert not any("helper" in name for name in state)
    state["_row_maps.t.assignments"].random_(0, 7)
    rows = assignments(collection).tolist()
    expected = torch.stack([torch.cat([books[0][a], books[1][b]]) for a, b in rows])
    assert torch.equal(collection.dense_weight("t"), expected)
    assert (PQ().num_rows, PQ().num_columns) == (256, 8)


# --- fitted to a trained table ---------------------------------------------------------------------------------------


def test_pq_is_k_means_of_every_column() -> None:
    method = PQ(num_rows=12, num_columns=2)
    before, collection = fitted(method, config=SETTLED)
    after, error = collection.dense_weight("t").double(), 0.0
    for column, points_VD in enumerate(before.chunk(2, dim=1)):
        centroids = collection.codebook(f"t:{column}").detach().double()
        own = assignments(collection)[:, column].tolist()
        for v in range(V):
            distances = [squared_error(points_VD[v], centroid) for centroid in centroids]
            assert distances[own[v]] <= min(distances) * (1 + 1e-6)
        for row in set(own):
            members = torch.stack([points_VD[v] for v in range(V) if own[v] == row])
            torch.testing.assert_close(centroids[row], members.mean(dim=0), rtol=1e-5, atol=1e-5)
            error += squared_error(members, members.mean(dim=0))
    assert squared_error(before, after) == pytest.approx(error, rel=1e-5)
    assert 0 < error < 0.6 * float(before.square().sum())


def test_pooled_outputs_are_near_the_full_tables() -> None:
    collection = trained(full(pooling=PoolingType.MEAN))
    bags = [[3, 3, 299], [], [17, 250, 1, 2]]
    expected = collection(make_kjt({"f": bags}))["f"].detach()
    errors = []
    for rows in (16, 64, 256):
        out = compress(collection, {"t": PQ(num_rows=rows, num_columns=4)}, from_trained=True)
        pooled = out(make_kjt({"f": bags}))["f"].detach()
        torch.testing.assert_close(pooled, pool(out.dense_weight("t"), bags, PoolingType.MEAN))
        errors.append(squared_error(pooled, expected) / squared_error(expected, torch.zeros(3, D)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("num_embeddings", [1, 5, 12])
@every_method
def test_no_more_ids_than_rows_is_lossless(method: MethodConfig, num_embeddings: int) -> None:
    method = dataclasses.replace(method, num_rows=12)  # type: ignore[call-arg]
    collection = trained(full(num_embeddings))
    before = collection.embedding_bags["t"].weight.detach().clone()
    after = compress(collection, {"t": method}, from_trained=True).dense_weight("t")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@every_method
def test_the_helper_is_the_mean_of_what_the_levels_leave(method: Any) -> None:
    before, collection = fitted(method)
    row_map = collection.lowered_tables[0].row_map
    rows_CVR = row_map.rows(torch.arange(V))
    num_main = method.num_rows * (method.num_levels - 1 if isinstance(method, ResidualCCE) else 1)
    left_over = 0.0
    for column, points_VD in enumerate(before.chunk(method.num_columns, dim=1)):
        book = next(p for i, p in enumerate(collection.parameters()) if i == column).detach().double()
        main_rows = [r for r in range(rows_CVR.shape[2]) if int(rows_CVR[column, :, r].max()) < num_main]
        left = points_VD - book[rows_CVR[column][:, main_rows]].sum(dim=1)
        helper_V = rows_CVR[column, :, -1]
        for row in range(num_main, len(book)):
            members = left[helper_V == row]
            expected = members.mean(dim=0) if len(members) else torch.zeros_like(book[row])
            torch.testing.assert_close(book[row], expected, rtol=1e-4, atol=1e-5)
        if len(book) > num_main:
            left = left - book[helper_V]
        left_over += squared_error(left, torch.zeros_like(left))
    assert squared_error(before, collection.dense_weight("t").double()) == pytest.approx(left_over, rel=1e-4)
    assert len(main_rows) == rows_CVR.shape[2] - (not isinstance(method, PQ))


def test_helpers_and_levels_take_error_away() -> None:
    errors = []
    for method in (
        PQ(num_rows=12, num_columns=2),
        CCE(num_rows=12, num_columns=2),
        ResidualCCE(num_rows=12, num_levels=3, num_columns=2),
    ):
        before, collection = fitted(method)
        errors.append(squared_error(before, collection.dense_weight("t").double()))
    assert errors[0] > errors[1] > errors[2]


@every_method
def test_same_seed_same_tables(method: MethodConfig) -> None:
    (_, one), (_, same), (_, other) = (fitted(method, seed=seed) for seed in (3, 3, 4))
    assert_same_state(one, same.state_dict())
    if method.num_rows > 1:
        assert not torch.equal(one.dense_weight("t"), other.dense_weight("t"))


def test_half_precision() -> None:
    collection = trained(full(data_type=DataType.FP16))
    before = collection.embedding_bags["t"].weight.detach().float()
    compressed = compress(collection, {"t": PQ(num_rows=290, num_columns=2)}, from_trained=True)
    assert {parameter.dtype for parameter in compressed.parameters()} == {torch.float16}
    torch.testing.assert_close(compressed.dense_weight("t"), before, rtol=0.02, atol=0.5)
    error = squared_error(compressed.dense_weight("t"), before)
    assert error < 1e-3 * squared_error(before, torch.zeros_like(before))


def test_fine_tuning_moves_centroids_and_no_assignment() -> None:
    _, collection = fitted(PQ(num_rows=12, num_columns=2))
    before, rows = collection.dense_weight("t"), assignments(collection).clone()
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (collection(make_kjt({"f": [[3], [17]]})).values() - 1).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(assignments(collection), rows)
    moved = (collection.dense_weight("t") != before).view(V, 2, 4).any(dim=2)
    assert torch.equal(moved, (rows == rows[3]) | (rows == rows[17]))  # all that share a centroid with them
    with pytest.raises(ValueError, match="has no table to re-cluster"):
        recluster(collection, seed=0)


def test_cce_can_be_reclustered_afterwards() -> None:
    before, collection = fitted(CCE(num_rows=40, num_columns=2))
    (report,) = recluster(collection, seed=1).tables
    assert report.version == 2
    assert squared_error(before, collection.dense_weight("t").double()) < 0.5 * float(before.square().sum())


# --- collections -----------------------------------------------------------------------------------------------------


def mixed() -> CompressedEmbeddingBagCollection:
    """Full tables beside compressed ones; what the latter have learned must survive."""

    def table(name: str, method: MethodConfig, **fields: Any) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=V, embedding_dim=D, feature_names=[f"f_{name}"], method=method, **fields
        )

    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        tables=[
            table("cce", CCE(num_rows=9, num_columns=2)),
            table("one", FullTable(), pooling=PoolingType.MEAN),
            table("two", FullTable()),
            table("ce", CE(num_rows=9, num_columns=2)),
        ],
        is_weighted=True,
        bounds_check_mode=BoundsCheckMode.IGNORE,
    ).eval()
    recluster(collection, seed=5)
    return collection


NEARLY_ALL = PQ(num_rows=280, num_columns=4)
RULE = CompressionRule(method="pq", tables="one|c.*", options=dataclasses.asdict(NEARLY_ALL))


@pytest.mark.parametrize("rules", [{"one": NEARLY_ALL}, [RULE]], ids=["by name", "by rule"])
def test_full_tables_of_a_compressed_collection(rules: Any) -> None:
    model = nn.Sequential(mixed())
    before = {name: model[0].dense_weight(name) for name in ("cce", "one", "two", "ce")}
    versions = [int(table.row_map.version) for table in model[0].lowered_tables[:1]]
    compress(model, rules, from_trained=True)
    after = model[0]
    assert [config.method.key for config in after.embedding_bag_configs()] == ["cce", "pq", "full", "ce"]
    assert [int(table.row_map.version) for table in after.lowered_tables[:1]] == versions == [1]
    for name in ("cce", "two", "ce"):
        assert torch.equal(after.dense_weight(name), before[name])
    error = squared_error(after.dense_weight("one"), before["one"])
    assert 0 < error < 0.01 * squared_error(before["one"], torch.zeros(V, D))
    assert after.is_weighted()
    assert not after.training
    assert after.bounds_check_mode == BoundsCheckMode.IGNORE
    assert after.embedding_bag_configs()[1].pooling == PoolingType.MEAN


def test_tables_that_stay_full_and_their_optimizers_are_kept() -> None:
    other = EmbeddingBagConfig(name="u", num_embeddings=50, embedding_dim=D, feature_names=["g"])
    collection = trained(full(), other)
    apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.5})
    kept = collection.embedding_bags["u"].weight.detach().clone()
    compressed = compress(collection, {"t": PQ(num_rows=12, num_columns=2)}, from_trained=True)
    assert torch.equal(compressed.dense_weight("u"), kept)
    before = compressed.dense_weight("t")
    compressed(make_kjt({"f": [[3]], "g": [[1]]}))["f"].sum().backward()
    torch.testing.assert_close(compressed.dense_weight("t")[3], before[3] - 0.5)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [HashingTrick(num_rows=9), Bloom(num_rows=9), CE(num_rows=9, num_columns=2), QR(num_remainders=9)],
    ids=lambda method: method.key,
)
def test_methods_without_assignments_cannot_be_fitted(method: MethodConfig) -> None:
    model = nn.Sequential(trained())
    message = rf"Table 't': from_trained=True cannot fit '{method.key}' .* one of cce, residual_cce, pq\."
    with pytest.raises(ValueError, match=message):
        compress(model, {"t": method}, from_trained=True)
    assert type(model[0]) is EmbeddingBagCollection


def test_a_table_that_is_compressed_already() -> None:
    with pytest.raises(ValueError, match=r"Table 'ce': CE\(.*\) compresses it already: only full tables"):
        compress(mixed(), {"ce": PQ(num_rows=9, num_columns=2)}, from_trained=True)
    with pytest.raises(ValueError, match=r"No table is compressed .*\['cce', 'one', 'two', 'ce'\]"):
        compress(mixed(), [CompressionRule(method="pq", tables="c.*", num_params=99)], from_trained=True)


def test_nothing_trained_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match=r"Table 't': from_trained=True needs trained weights, .* meta device"):
        compress(
            EmbeddingBagCollection([full()], device=torch.device("meta")), {"t": PQ(num_rows=9)}, from_trained=True
        )


def test_weights_that_are_not_finite_change_nothing() -> None:
    model = nn.Sequential(trained())
    with torch.no_grad():
        model[0].embedding_bags["t"].weight[7, 5] = float("nan")
    before = state_copy(model)
    with pytest.raises(ValueError, match="Table 't': 1 of 1200 weights of column 1 are NaN or infinite"):
        compress(model, {"t": PQ(num_rows=9, num_columns=2)}, from_trained=True)
    torch.testing.assert_close(dict(model.state_dict()), before, equal_nan=True)


def test_settings_of_a_fit_without_one() -> None:
    with pytest.raises(ValueError, match="from_trained=True"):
        compress(trained(), {"t": PQ(num_rows=9)}, config=SETTLED)
