"""The ways into a sharded collection: from the CPU or from meta, by DMP or `shard`, whichever way the optimizer is given."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import sharding_plan
from torchrec.distributed.shard import shard as shard_one
from torchrec.distributed.shard import shard_modules
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagCollectionSharder,
    CompressedEmbeddingBagConfig,
    recluster,
)
from cce_torchrec.methods import CCE, CE, QR, HashingTrick
from tests.distributed.harness import RankError, RankPool
from tests.distributed.models import (
    EPS,
    LEARNING_RATE,
    ON_2,
    ROWWISE_ADAGRAD,
    Model,
    Placement,
    batch,
    make_plan,
    mixed_on_2,
    physical_tables,
    row_wise,
    shard,
    table_wise,
)
from tests.distributed.reference import (
    RowwiseAdagrad,
    loss_of,
    pieces_of,
    table_of,
    train_step,
    whole_fused_sums,
    whole_optimizer_state,
    whole_state,
)

pytestmark = pytest.mark.distributed


def exact_state(model: nn.Module) -> dict[str, Tensor]:
    return dict(sorted(model.state_dict().items()))


def assert_exactly(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- state ---------------------------------------------------------------------------------------------------------------


def check_state_survives(rank: int, world_size: int, places: str) -> None:
    model = Model()
    recluster(model, seed=3)  # so that assignments and version are not those of a new collection
    expected = {name: value.clone() for name, value in exact_state(model).items()}
    dmp = shard(model, ON_2[places](physical_tables(model.collection)), fused_params=ROWWISE_ADAGRAD)
    assert_exactly(whole_state(dmp), expected)


@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise", "mixed"])
def test_state_of_a_cpu_module_survives_exactly(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_state_survives, places)


def check_ranks_that_differ(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    model = Model()
    recluster(model, seed=rank)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    dmp = shard(model, mixed_on_2(physical_tables(model.collection)), fused_params=ROWWISE_ADAGRAD)
    of_rank_0 = [original]
    dist.broadcast_object_list(of_rank_0)
    replicated = 0
    for name, value in dmp.state_dict().items():
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
            replicated += 1
            torch.testing.assert_close(value.detach(), of_rank_0[0][name], rtol=0, atol=0)
            continue
        for (row, column), piece in pieces_of(value):
            height, width = piece.shape
            expected = original[name][row : row + height, column : column + width]
            torch.testing.assert_close(piece, expected, rtol=0, atol=0)
    assert replicated > 5  # data-parallel codebooks, assignments and hashes
    whole_state(dmp)  # replicas agree


def test_replicas_agree_where_ranks_were_built_differently(ranks2: RankPool) -> None:
    ranks2.run(check_ranks_that_differ)


def wide_tables() -> list[EmbeddingBagConfig]:
    """Large enough to measure a variance."""

    def table(name: str, feature: str, method: object, **more: object) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=400, embedding_dim=16, feature_names=[feature], method=method, **more
        )

    return [
        table("cce", "f", CCE(num_rows=300, num_columns=2)),
        table("qr", "h", QR(num_remainders=200)),
        table("ce", "i", CE(num_rows=300, num_columns=2), init_fn=partial(nn.init.normal_, std=3.0)),
        EmbeddingBagConfig(name="plain", num_embeddings=400, embedding_dim=16, feature_names=["j"]),
    ]


def check_meta(rank: int, world_size: int, places: str) -> None:
    torch.manual_seed(rank)
    on_cpu, on_meta = Model(wide_tables()), Model(wide_tables(), device="meta")
    dmp = shard(on_meta, ON_2[places](physical_tables(on_meta.collection)), fused_params=ROWWISE_ADAGRAD)
    actual, expected = whole_state(dmp), exact_state(on_cpu)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if not value.is_floating_point():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0)
            continue
        # 2,400 numbers at least, of which a deviation is wrong by 2 %; every row counts, so that none was left out.
        torch.testing.assert_close(actual[name].std(), value.std(), rtol=0.1, atol=0)
        assert abs(float(actual[name].mean())) < 0.1 * float(value.std())
        assert float(actual[name].abs().max()) < 1.5 * float(value.abs().max())
        assert bool((actual[name].std(1) > 0).all())
        assert len(actual[name].unique()) > 0.99 * value.numel()


@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise", "mixed"])
def test_meta_module_is_initialised_like_a_real_one(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_meta, places)


# --- optimizers ----------------------------------------------------------------------------------------------------------


def check_optimizer_route(rank: int, world_size: int, device: str, in_backward: bool) -> None:
    """Four sharding types; a dense optimizer trains the data-parallel tables unless theirs was applied in backward."""
    reference, model = Model(), Model(device=device)
    if in_backward:
        apply_optimizer_in_backward(RowWiseAdagrad, model.parameters(), {"lr": LEARNING_RATE, "eps": EPS})
    placements = mixed_on_2(physical_tables(model.collection))
    dmp = shard(model, placements, fused_params=None if in_backward else ROWWISE_ADAGRAD)
    dmp.load_state_dict(reference.state_dict())
    replicated = {name for name, place in placements.items() if place.sharding_type == "data_parallel"}
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    assert {table_of(name) for name in dense} == (set() if in_backward else replicated)
    ours = RowWiseAdagrad(dense.values(), lr=LEARNING_RATE, eps=EPS) if dense else None
    theirs = RowwiseAdagrad(reference, {name: place.column_shards for name, place in placements.items()})
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batches = [batch(generator, 4) for _ in range(world_size)]
        train_step(reference, batches)
        theirs.step()
        if ours is not None:
            ours.zero_grad()
        loss_of(dmp(batches[rank])).backward()
        if ours is not None:
            ours.step()
    torch.testing.assert_close(whole_state(dmp), exact_state(reference), rtol=1e-4, atol=1e-5)
    sums = whole_fused_sums(dmp) | whole_optimizer_state(dmp, ours, "sum")
    torch.testing.assert_close(sums, theirs.sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("in_backward", [True, False], ids=["in_backward", "fused_params"])
def test_optimizer_routes(ranks2: RankPool, device: str, in_backward: bool) -> None:
    ranks2.run(check_optimizer_route, device, in_backward)


# --- names and the `shard` functions -------------------------------------------------------------------------------------


def shard_by_plan(model: Model, sharder: CompressedEmbeddingBagCollectionSharder) -> nn.Module:
    plan = make_plan(sharder, model.collection, mixed_on_2(physical_tables(model.collection)), 2)
    model.collection = shard_one(model.collection, plan, sharder=sharder)
    return model


def shard_by_generator(model: Model, sharder: CompressedEmbeddingBagCollectionSharder) -> nn.Module:
    model.collection = shard_one(model.collection, sharding_plan.row_wise(compute_kernel="fused"), sharder=sharder)
    return model


def shard_by_generators(model: Model, sharder: CompressedEmbeddingBagCollectionSharder) -> nn.Module:
    fused = {"compute_kernel": "fused"}
    generators = [
        sharding_plan.row_wise(**fused),
        sharding_plan.table_wise(rank=1, **fused),
        sharding_plan.data_parallel(),
    ]
    plan = {name: generators[index % 3] for index, name in enumerate(physical_tables(model.collection))}
    model.collection = shard_one(model.collection, plan, sharder=sharder)
    return model


def shard_within_model(model: Model, sharder: CompressedEmbeddingBagCollectionSharder) -> nn.Module:
    plan = make_plan(sharder, model.collection, mixed_on_2(physical_tables(model.collection)), 2)
    return shard_modules(model, plan=ShardingPlan(plan={"collection": plan}), sharders=[sharder])


def shard_top_level(model: Model, sharder: CompressedEmbeddingBagCollectionSharder) -> nn.Module:
    plan = make_plan(sharder, model.collection, mixed_on_2(physical_tables(model.collection)), 2)
    model.collection = shard_modules(model.collection, plan=ShardingPlan(plan={"": plan}), sharders=[sharder])
    return model


ROUTES = {
    route.__name__: route
    for route in (shard_by_plan, shard_by_generator, shard_by_generators, shard_within_model, shard_top_level)
}


def check_route(rank: int, world_size: int, route: str) -> None:
    reference, model = Model(), Model()
    model.load_state_dict(reference.state_dict())
    sharded = ROUTES[route](model, CompressedEmbeddingBagCollectionSharder(fused_params=ROWWISE_ADAGRAD))
    assert not isinstance(sharded.collection, CompressedEmbeddingBagCollection)
    features = batch(torch.Generator().manual_seed(rank), 4)
    pooled, expected = sharded(features), reference(features)
    assert pooled.keys() == expected.keys()
    torch.testing.assert_close(pooled.values(), expected.values())
    assert_exactly(whole_state(sharded), exact_state(reference))
    for names in ("named_parameters", "named_buffers", "state_dict"):
        ours, theirs = getattr(sharded, names)(), getattr(reference, names)()
        assert set(dict(ours)) == set(dict(theirs)), names


@pytest.mark.parametrize("route", list(ROUTES))
def test_shard_functions_keep_outputs_state_and_names(ranks2: RankPool, route: str) -> None:
    ranks2.run(check_route, route)


def check_dmp_names(rank: int, world_size: int) -> None:
    reference, model = Model(), Model()
    dmp = shard(model, mixed_on_2(physical_tables(model.collection)), fused_params=ROWWISE_ADAGRAD)
    assert set(dmp.state_dict()) == set(reference.state_dict())
    assert set(dict(dmp.named_parameters())) == set(dict(reference.named_parameters()))
    assert set(dict(dmp.named_buffers())) == set(dict(reference.named_buffers()))


def test_dmp_keeps_names(ranks2: RankPool) -> None:
    ranks2.run(check_dmp_names)


def check_missing_table(rank: int, world_size: int) -> None:
    model = Model()
    placements = mixed_on_2(physical_tables(model.collection))
    sharder = CompressedEmbeddingBagCollectionSharder(fused_params=ROWWISE_ADAGRAD)
    plan = make_plan(sharder, model.collection, placements, world_size)
    del plan["cce:1"]
    with pytest.raises(ValueError, match=r"no entry for \['cce:1'\]"):
        shard_one(model.collection, plan, sharder=sharder)


def test_plan_without_a_table_is_an_error(ranks2: RankPool) -> None:
    ranks2.run(check_missing_table)


# --- ids out of bounds ---------------------------------------------------------------------------------------------------


def with_bad_id(features: KeyedJaggedTensor, *names: str) -> KeyedJaggedTensor:
    for name in names:
        features[name].values()[0] = 10**6  # a view
    return features


def owned_by(names: list[str], place: Callable) -> dict:
    """CCE on rank 0, the rest on rank 1."""
    return {name: place(0 if name.startswith("cce") else 1) for name in names}


PLACES = {"row_wise": lambda rank: row_wise(2), "table_wise": table_wise}


def check_bounds(rank: int, world_size: int, places: str, mode: BoundsCheckMode | None) -> None:
    reference, model = Model(), Model()
    model.load_state_dict(reference.state_dict())
    more = {} if mode is None else {"bounds_check_mode": mode}
    dmp = shard(model, owned_by(physical_tables(model.collection), PLACES[places]), fused_params=ROWWISE_ADAGRAD | more)
    features = batch(torch.Generator().manual_seed(0), 4)
    torch.testing.assert_close(dmp(features).values(), reference(features).values())
    # Both ranks send a bad id, and both own a table that gets one, so both raise wherever the check is.
    bad = with_bad_id(batch(torch.Generator().manual_seed(0), 4), "g", "h")
    if mode is None or mode == BoundsCheckMode.FATAL:
        with pytest.raises(IndexError, match=r"id 1000000 is outside \[0, (101|53)\)"):
            dmp(bad)
    else:
        zero = with_bad_id(features, "g", "h")
        zero.values().masked_fill_(zero.values() == 10**6, 0)
        hashed = "g@hashed"  # g is also a feature of a table that hashes, for which no id is bad
        pooled, expected = dmp(bad).to_dict(), reference(zero).to_dict()
        assert not torch.equal(pooled.pop(hashed), expected.pop(hashed))
        torch.testing.assert_close(pooled, expected)
    dist.barrier()  # nobody is left in a collective


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mode", [None, BoundsCheckMode.FATAL, BoundsCheckMode.WARNING], ids=str)
def test_bounds_check_mode(ranks2: RankPool, places: str, mode: BoundsCheckMode | None) -> None:
    ranks2.run(check_bounds, places, mode)


def one_bad_rank(rank: int, world_size: int, places: str) -> tuple[str, float]:
    model = Model()
    dmp = shard(model, owned_by(physical_tables(model.collection), PLACES[places]), fused_params=ROWWISE_ADAGRAD)
    features = batch(torch.Generator().manual_seed(0), 4)
    if rank == 1:
        features = with_bad_id(features, "g")
    started = time.monotonic()
    try:
        dmp(features).values()
    except Exception as error:
        return type(error).__name__, time.monotonic() - started
    return "", time.monotonic() - started


@pytest.mark.parametrize("places", PLACES)
def test_one_bad_id_ends_on_every_rank(places: str) -> None:
    """The rank that sees the id (row-wise: its own; table-wise: the owner) says so; the other's collective times out."""
    with RankPool(2, collective_timeout=3.0) as pool:
        results = pool.run(one_bad_rank, places, timeout=30.0)
    names, seconds = zip(*results, strict=True)
    seer = 1 if places == "row_wise" else 0
    assert names[seer] == "IndexError"
    assert names[1 - seer] == "RuntimeError"
    assert max(seconds) < 15


def check_shards_differ(rank: int, world_size: int) -> None:
    """Ranks with one seed draw shards of their own; equal ones would make CCE's helper rows copies of its main rows."""
    torch.manual_seed(0)
    model = Model(device="meta")
    dmp = shard(model, {name: row_wise(world_size) for name in physical_tables(model.collection)})
    for name, weight in whole_state(dmp).items():
        if "embedding_bags." in name:
            assert len(weight.unique(dim=0)) == len(weight), name


def test_shards_from_meta_differ_although_ranks_share_a_seed(ranks2: RankPool) -> None:
    ranks2.run(check_shards_differ)


def test_rows_too_few_for_every_rank_are_an_error_on_the_cpu(ranks4: RankPool) -> None:
    with pytest.raises(RankError, match=r"'t' has too few rows \(3\) for 4 row-wise shards"):
        ranks4.run(check_tiny)


def check_tiny(rank: int, world_size: int) -> None:
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=50, embedding_dim=8, feature_names=["f"], method=HashingTrick(num_rows=3)
    )
    model = Model([table])
    shard(model, {"t": row_wise(world_size)})


def check_refused(rank: int, world_size: int, num_columns: int, placement: Placement) -> None:
    table = CompressedEmbeddingBagConfig(
        name="t",
        num_embeddings=50,
        embedding_dim=16,
        feature_names=["f"],
        method=CCE(num_rows=4, num_columns=num_columns),
    )
    model = Model([table])
    shard(model, dict.fromkeys(physical_tables(model.collection), placement))


@pytest.mark.parametrize(
    ("num_columns", "placement", "message"),
    [
        (8, table_wise(0), r"shards of \[2\] dims.*multiples of 4.*num_columns"),
        (2, Placement("column_wise", (0, 1, 0, 1), 4), r"shards of \[2\] dims"),
        (2, Placement("data_parallel", (0, 1), kernel="fused"), "data_parallel with the 'fused' kernel"),
    ],
    ids=["narrow_columns", "narrow_shards", "fused_data_parallel"],
)
def test_what_torchrec_would_not_do_is_an_error(
    ranks2: RankPool, num_columns: int, placement: Placement, message: str
) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.run(check_refused, num_columns, placement)


def check_dense_kernel(rank: int, world_size: int, in_backward: bool) -> None:
    model = Model()
    if in_backward:
        apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": LEARNING_RATE})
    dense = Placement("table_wise", (0,), kernel="dense")
    shard(
        model,
        dict.fromkeys(physical_tables(model.collection), dense),
        fused_params=None if in_backward else ROWWISE_ADAGRAD,
    )


@pytest.mark.parametrize(("in_backward", "asked"), [(True, "apply_optimizer_in_backward"), (False, "optimizer")])
def test_a_dense_kernel_that_would_leave_an_optimizer_out_is_an_error(
    ranks2: RankPool, in_backward: bool, asked: str
) -> None:
    with pytest.raises(RankError, match=f"'dense' kernel, which ignores .*{asked}"):
        ranks2.run(check_dense_kernel, in_backward)
