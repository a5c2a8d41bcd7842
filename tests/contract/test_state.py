"""Every method: initialisation, seeds, checkpoints, the meta device."""

import copy
import dataclasses
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cce_torchrec import CompressedEmbeddingBagCollection, recluster
from cce_torchrec.methods import RowMethod, TableSpec
from tests.contract.cases import VARIANTS, Variant, budgets, make_table, parameters, table_of
from tests.unit.oracles import make_kjt

V, D = 50, 8

SEEDED = [
    v
    for v in VARIANTS
    if "seed" in {field.name for field in dataclasses.fields(v.method)} and v.overrides.get("assignments") != "blocks"
]

every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def build(
    variant: Variant, seed: int = 0, device: str | None = None, **fields: int
) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(seed)
    method = dataclasses.replace(variant.from_budget(V, D, budgets(variant, V, D)[-2]), **fields)
    return CompressedEmbeddingBagCollection(
        tables=[make_table(method, num_embeddings=V, embedding_dim=D, feature_names=["f"])], device=device
    )


def trained(variant: Variant) -> CompressedEmbeddingBagCollection:
    """One whose buffers have moved on, where they can."""
    collection = build(variant, seed=1)
    if variant.method.reclusterable:
        recluster(collection, seed=0)
    return collection


def outputs(collection: CompressedEmbeddingBagCollection) -> Tensor:
    return collection(make_kjt({"f": [[number] for number in range(V)]}))["f"].detach()


def initial_mean_square(variant: Variant, num_embeddings: int, dim: int, **fields: Any) -> float:
    """The mean squared entry of the decoded table over many draws (some methods have few rows of one kind)."""
    budget = max(budgets(variant, num_embeddings, dim)[0], num_embeddings * dim // 8)
    table = make_table(
        variant.from_budget(num_embeddings, dim, budget), num_embeddings=num_embeddings, embedding_dim=dim, **fields
    )
    torch.manual_seed(0)
    draws = [CompressedEmbeddingBagCollection(tables=[table]).dense_weight("t") for _ in range(24)]
    return float(torch.stack(draws).double().square().mean())


@every_method
def test_initial_variance_is_the_full_tables(variant: Variant) -> None:
    # TorchRec's default is uniform on +-sqrt(1 / V); the variance of uniform(-b, b) is b^2 / 3.
    assert initial_mean_square(variant, 1000, 16) == pytest.approx(1 / 1000 / 3, rel=0.13)


@every_method
def test_initial_variance_follows_the_configs_bounds_and_init_fn(variant: Variant) -> None:
    bounds = {"weight_init_min": -0.5, "weight_init_max": 0.5}
    assert initial_mean_square(variant, 1000, 16, **bounds) == pytest.approx(0.25 / 3, rel=0.13)
    normal = partial(torch.nn.init.normal_, std=3.0)
    assert initial_mean_square(variant, 1000, 16, init_fn=normal) == pytest.approx(9.0, rel=0.13)


@every_method
def test_state_dict_round_trip(variant: Variant) -> None:
    source, twin = trained(variant), build(variant, seed=2)
    assert not torch.equal(source.dense_weight("t"), twin.dense_weight("t"))
    twin.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    assert torch.equal(source.dense_weight("t"), twin.dense_weight("t"))
    assert torch.equal(outputs(source), outputs(twin))


@every_method
def test_everything_trainable_and_stored_is_in_the_state_dict(variant: Variant) -> None:
    collection = build(variant)
    stored = {tensor.data_ptr() for tensor in [*collection.parameters(), *collection.buffers()]}
    assert {tensor.data_ptr() for tensor in collection.state_dict().values()} == stored
    assert all(parameter.requires_grad and parameter.is_floating_point() for parameter in collection.parameters())


@every_method
def test_same_seed_same_result(variant: Variant) -> None:
    assert torch.equal(build(variant, seed=3).dense_weight("t"), build(variant, seed=3).dense_weight("t"))
    assert not torch.equal(build(variant, seed=3).dense_weight("t"), build(variant, seed=4).dense_weight("t"))


@pytest.mark.parametrize("variant", SEEDED, ids=str)
def test_the_methods_own_seed_and_the_tables_name_choose_the_rows(variant: Variant) -> None:
    method = variant.from_budget(V, D, budgets(variant, V, D)[-2])

    def rows(seed: int, name: str) -> Tensor:
        """The rows of all ids, or their vectors where parameters are drawn alike."""
        seeded = dataclasses.replace(method, seed=seed)
        if isinstance(seeded, RowMethod):
            return seeded.row_map(name, V, D, None).rows(torch.arange(V))
        torch.manual_seed(0)
        spec = TableSpec(name=name, num_embeddings=V, embedding_dim=D, std=1.0, dtype=torch.float32, device=None)
        return seeded.decoder(spec)(torch.arange(V))

    assert torch.equal(rows(0, "t"), rows(0, "t"))
    assert not torch.equal(rows(0, "t"), rows(1, "t"))
    assert not torch.equal(rows(0, "t"), rows(0, "u"))


@every_method
def test_meta_then_a_checkpoint(variant: Variant) -> None:
    source, twin = trained(variant), build(variant, device="meta")
    assert twin.device == torch.device("meta")
    assert {tensor.device.type for tensor in [*twin.parameters(), *twin.buffers()]} == {"meta"}
    assert parameters(twin).keys() == parameters(source).keys()
    twin.to_empty(device="cpu")
    twin.load_state_dict(source.state_dict())
    assert torch.equal(outputs(source), outputs(twin))


@every_method
def test_meta_then_reset_is_a_fresh_one(variant: Variant) -> None:
    fresh, twin = build(variant), build(variant, device="meta").to_empty(device="cpu")
    for collection in (fresh, twin):
        torch.manual_seed(5)
        collection.reset_parameters()
    assert twin.device == torch.device("cpu")
    assert torch.equal(outputs(fresh), outputs(twin))
    assert outputs(fresh).isfinite().all()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@every_method
def test_a_copy_is_whole_and_independent(variant: Variant, duplicate: Any) -> None:
    source = trained(variant)
    twin, before = duplicate(source), outputs(source)
    assert torch.equal(outputs(twin), before)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.mul_(2)
    if variant.method.reclusterable:
        recluster(twin, seed=1)
    torch.testing.assert_close(outputs(twin), twin.dense_weight("t"))
    assert not torch.equal(outputs(twin), before)
    assert torch.equal(outputs(source), before)


@every_method
def test_an_optimizer_step_moves_what_was_looked_up(variant: Variant) -> None:
    collection = build(variant)
    dense = table_of(collection, "t").dense_part is not None
    lr = 1e-4 if dense else 0.1
    optimizer = torch.optim.SGD(collection.parameters(), lr=lr)
    before = collection.dense_weight("t")
    collection(make_kjt({"f": [[4], []]}))["f"].sum().backward()
    if dense:  # to first order, the sum falls by lr times the squared gradient
        expected = -lr * sum(float(p.grad.double().square().sum()) for p in collection.parameters())
        optimizer.step()
        fallen = (collection.dense_weight("t") - before)[4].double().sum()
        assert float(fallen) == pytest.approx(expected, rel=0.05)
        return
    optimizer.step()
    moved = collection.dense_weight("t") - before
    # Each row moves by lr times how often it is added up, in every dim; scaled going down and coming back.
    row_map = collection.lowered_tables[0].row_map
    step = []
    for (rows,), column in zip(row_map.rows(torch.tensor([4])).tolist(), row_map.columns, strict=True):
        step += [-0.1 * row_map.scale**2 * sum(rows.count(row) for row in rows)] * column.dim
    torch.testing.assert_close(moved[4], torch.tensor(step), rtol=1e-4, atol=1e-5)
