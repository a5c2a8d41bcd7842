"""Tables that take in more ids: what was there stays bit by bit, new ids are hashed, everything that counts ids follows."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor

from cce_torchrec import (
    METHODS,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    recluster,
)
from cce_torchrec.methods import CCE, LowDim, MethodConfig, ResidualCCE
from cce_torchrec.planner.reservation import assignment_bytes_per_rank
from tests.unit.cce_tables import assert_same_state, build, cce_table, state_copy

V, GROWN, DIM = 100, 171, 16
SIZED_BY_ID = ("full", "qr", "tt_rec")


def variants() -> dict[str, MethodConfig]:
    """Every method of the registry, and its variants that grow in another way."""
    found = {key: method.from_budget(V, DIM, V * DIM) for key, method in METHODS.items()}
    return {
        **found,
        "low_dim": LowDim(dim=4),
        "low_dim, hashed": LowDim(dim=4, num_rows=10),
        "cce, packed": CCE(num_rows=12, num_columns=2, bit_packed=True),
        "cce, warm": CCE(num_rows=12, num_columns=2, num_assigned_ids=40),
        "cce, room": CCE(num_rows=12, num_columns=2, num_assigned_ids=150),
        "cce, hot": CCE(num_rows=12, num_columns=2, num_hot_ids=7),
        "residual, packed and warm": ResidualCCE(num_rows=5, num_columns=2, bit_packed=True, num_assigned_ids=40),
    }


def collection_of(
    method: MethodConfig, num_embeddings: int = V, mode: BoundsCheckMode = BoundsCheckMode.FATAL
) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=DIM, feature_names=["f"], method=method
    )
    return CompressedEmbeddingBagCollection(tables=[table], bounds_check_mode=mode)


def look_up(collection: CompressedEmbeddingBagCollection, *ids: int) -> torch.Tensor:
    lengths = torch.ones(len(ids), dtype=torch.int64)
    return collection(KeyedJaggedTensor(["f"], torch.tensor(ids), lengths=lengths))["f"]


@pytest.mark.parametrize("name", [name for name in variants() if name not in (*SIZED_BY_ID, "low_dim")])
def test_a_grown_table_keeps_what_it_has(name: str) -> None:
    """What is stored is as large as in a table that had all ids from the start, and loads into it."""
    method = variants()[name]
    collection, roomy = collection_of(method), collection_of(method, GROWN)
    optimizer = torch.optim.Adam(collection.parameters(), lr=0.1)
    look_up(collection, 1, 5, V - 1).sum().backward()
    optimizer.step()
    if method.reclusterable:
        recluster(collection, seed=0, optimizer=optimizer)
    collection.eval()
    parameters, before = list(collection.parameters()), look_up(collection, *range(V))
    states = [{key: torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()} for p in parameters]

    collection.grow("t", GROWN)

    assert torch.equal(look_up(collection, *range(V)), before)  # the same batch: networks round by its size
    after = collection.dense_weight("t")
    assert after.shape == (GROWN, DIM)
    for p, q, state in zip(collection.parameters(), parameters, states, strict=True):
        assert p is q
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][key]), value) for key, value in state.items())
    shapes = {key: (value.shape, value.dtype) for key, value in collection.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in roomy.state_dict().items()}
    report, expected = collection.memory_report().tables[0], roomy.memory_report().tables[0]
    assert (report.assignment_bytes, report.full_bytes) == (expected.assignment_bytes, expected.full_bytes)
    assert assignment_bytes_per_rank(collection, 2) == assignment_bytes_per_rank(roomy, 2)
    torch.testing.assert_close(look_up(collection, V, GROWN - 1), after[[V, GROWN - 1]])
    roomy.load_state_dict(collection.state_dict())
    assert torch.equal(roomy.dense_weight("t"), after)


@pytest.mark.parametrize("name", ["cce", "pq", "residual_cce", "cce_robe", "cce, packed", "cce, warm"])
def test_new_ids_begin_as_in_a_table_that_had_them_from_the_start(name: str) -> None:
    collection, roomy = collection_of(variants()[name]), collection_of(variants()[name], GROWN)
    (old,) = (v for v in state_copy(collection).values() if not v.is_floating_point() and v.dim() == 2)
    collection.grow("t", GROWN)
    for key, value in roomy.state_dict().items():
        found = collection.state_dict()[key]
        if not value.is_floating_point() and value.dim() == 2 and len(value) == GROWN:
            assert torch.equal(found[:V], old), key
            assert torch.equal(found[V:], value[V:]), key
        elif not value.is_floating_point():
            assert torch.equal(found, value), key


@pytest.mark.parametrize("name", [*SIZED_BY_ID, "low_dim"])
def test_a_table_with_parameters_sized_by_id_does_not_grow(name: str) -> None:
    collection = collection_of(variants()[name])
    before = state_copy(collection)
    with pytest.raises(ValueError, match=r"'t' cannot grow: its method .* has parameters, or blocks of ids, sized by"):
        collection.grow("t", V + 1)
    assert_same_state(collection, before)
    assert collection.embedding_bag_configs()[0].num_embeddings == V


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        ("u", V + 1, r"No table 'u'; the tables are \['t'\]"),
        ("t", V - 1, f"'t' has {V} ids, so it cannot grow to {V - 1}"),
        ("t", 1.5, "num_embeddings=1.5 is not a positive integer"),
    ],
)
def test_growth_that_cannot_be(table: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collection_of(CCE(num_rows=12, num_columns=2)).grow(table, size)


def test_bounds_follow() -> None:
    for name in ("cce", "cce_robe"):
        collection = collection_of(variants()[name])
        with pytest.raises(IndexError, match=rf"id {V} is outside \[0, {V}\)"):
            look_up(collection, V)
        collection.grow("t", V + 1)
        look_up(collection, V)
        with pytest.raises(IndexError, match=rf"id {V + 1} is outside \[0, {V + 1}\)"):
            look_up(collection, V + 1)


def test_a_config_that_others_use_does_not_change() -> None:
    table = cce_table(V)
    grown, other = build(table), build(table)
    grown.grow("t", GROWN)
    assert table.num_embeddings == other.embedding_bag_configs()[0].num_embeddings == V
    assert grown.embedding_bag_configs()[0].num_embeddings == GROWN


def test_a_grown_table_is_clustered_whole() -> None:
    collection = build(cce_table(V, method=CCE(num_rows=300, num_columns=2)))
    recluster(collection, seed=0)
    collection.grow("t", GROWN)
    before = collection.dense_weight("t")
    report = recluster(collection, seed=1, id_weights={"t": torch.ones(GROWN)}).tables[0]
    assert report.relative_squared_error < 1e-9  # more rows than ids
    torch.testing.assert_close(collection.dense_weight("t"), before, rtol=1e-5, atol=1e-5)


def test_ids_that_appear_may_become_warm() -> None:
    collection = build(cce_table(V, method=CCE(num_rows=12, num_columns=2, num_assigned_ids=40)))
    recluster(collection, seed=0, id_weights={"t": torch.ones(V)})
    collection.grow("t", GROWN)
    weights = torch.zeros(GROWN)
    weights[V + 5 : V + 9] = 1
    recluster(collection, seed=1, id_weights={"t": weights})
    warm = collection.state_dict()["_row_maps.t.warm_ids"]
    assert warm[warm >= 0].tolist() == [105, 106, 107, 108]


def test_an_older_state_dict_is_loaded_first_and_grown_then() -> None:
    method = CCE(num_rows=12, num_columns=2)
    old, new = collection_of(method), collection_of(method)
    new.grow("t", GROWN)
    before = state_copy(new)
    with pytest.raises(ValueError, match="if the vocabulary has grown, load first, then grow"):
        new.load_state_dict(old.state_dict())
    assert_same_state(new, before)
