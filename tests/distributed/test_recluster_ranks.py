"""Re-clustering on 2 and 4 ranks gives what one process gives; optimizer state follows; a failure changes nothing.

The oracle of the clustering is the unsharded collection, that of carried optimizer state a loop over ids.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import CompressedEmbeddingBagConfig, ReclusterConfig, recluster
from cce_torchrec.hashing import hash_rows
from cce_torchrec.methods import CCE, ResidualCCE
from cce_torchrec.recluster import table_sums as table_module
from tests.distributed.harness import RankPool
from tests.distributed.models import (
    DATA_PARALLEL,
    DIM,
    EPS,
    LEARNING_RATE,
    ON_2,
    ON_4,
    ROWWISE_ADAGRAD,
    Model,
    Placement,
    batch,
    physical_tables,
    row_wise,
    shard,
    table_wise,
)
from tests.distributed.reference import (
    codebooks,
    loss_of,
    whole_fused_sums,
    whole_optimizer_state,
    whole_state,
)

pytestmark = pytest.mark.distributed

State = dict[str, Tensor]
CONFIG = ReclusterConfig(decode_batch_size=100, points_per_centroid=40, num_iterations=8)  # several batches, a sample
ON_1 = {"mixed": lambda names: {n: [row_wise(1), table_wise(0), DATA_PARALLEL][i % 3] for i, n in enumerate(names)}}
RESET = dataclasses.replace(CONFIG, optimizer_state="reset")


def tables(num_rows: int = 12) -> list[EmbeddingBagConfig]:
    """Three to re-cluster, none a multiple of any number of ranks, and one to leave alone."""

    def cce(name: str, size: int, feature: str, method: CCE) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=DIM, feature_names=[feature], method=method
        )

    return [
        cce("a", 1001, "f", CCE(num_rows=num_rows, num_columns=2)),
        EmbeddingBagConfig(name="plain", num_embeddings=57, embedding_dim=DIM, feature_names=["h"]),
        cce("b", 203, "g", CCE(num_rows=7, num_columns=2, num_helper_rows=12)),
        cce("r", 151, "j", ResidualCCE(num_rows=6, num_levels=3, num_columns=2, num_helper_rows=5)),
    ]


def placements_of(world_size: int, places: str) -> dict[str, Placement]:
    names = physical_tables(Model(tables()).collection)
    return {1: ON_1, 2: ON_2, 4: ON_4}[world_size][places](names)


def sharded(
    world_size: int, places: str, model: nn.Module, paths: Sequence[str] = ("collection",)
) -> DistributedModelParallel:
    placements = placements_of(world_size, places)
    return shard(model, placements, fused_params=ROWWISE_ADAGRAD, local_size=min(world_size, 2), paths=paths)


def frozen(state: State) -> State:
    return {name: value.detach().clone() for name, value in sorted(state.items())}


# --- the number of ranks ---------------------------------------------------------------------------------------------


def recluster_sharded(rank: int, world_size: int, places: str, state: State, num_rows: int) -> Any:
    model = Model(tables(num_rows))
    model.load_state_dict(state)
    dmp = sharded(world_size, places, model)
    reports = [recluster(dmp, seed=seed, config=CONFIG) for seed in (1, 2)]
    rows = [(table.table, table.version, table.relative_squared_error) for report in reports for table in report.tables]
    return whole_state(dmp), rows


def assert_same_clustering(state: State, reports: list, expected: Model, expected_reports: list) -> None:
    for name, value in expected.state_dict().items():
        if name.endswith("assignments"):
            assert (state[name] == value).float().mean() >= 0.999, name  # ties may fall differently
        elif not value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    actual = Model(expected.collection.embedding_bag_configs())
    actual.load_state_dict(state)
    for table in ("a", "plain", "b", "r"):
        ours, theirs = actual.collection.dense_weight(table), expected.collection.dense_weight(table)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(reports, expected_reports, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


def check_number_of_ranks(pool: RankPool, places: str, num_rows: int) -> None:
    torch.manual_seed(0)
    expected = Model(tables(num_rows))
    state = frozen(expected.state_dict())
    expected_reports = [
        (table.table, table.version, table.relative_squared_error)
        for seed in (1, 2)
        for table in recluster(expected, seed=seed, config=CONFIG).tables
    ]
    assert not torch.equal(expected.state_dict()["collection._row_maps.a.assignments"], next(iter(state.values())))
    results = pool.run(recluster_sharded, places, state, num_rows)
    for result in results:
        assert_same_clustering(*result, expected, expected_reports)
        torch.testing.assert_close(result[0], results[0][0], rtol=0, atol=0)


def test_1_sharded_rank_clusters_as_an_unsharded_model() -> None:
    with RankPool(1) as pool:
        check_number_of_ranks(pool, "mixed", num_rows=12)


@pytest.mark.parametrize("places", [*ON_2])
def test_2_ranks_cluster_as_one(ranks2: RankPool, places: str) -> None:
    check_number_of_ranks(ranks2, places, num_rows=12)


@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise", "grid_shard", "mixed"])
def test_4_ranks_cluster_as_one(two_hosts: RankPool, places: str) -> None:
    check_number_of_ranks(two_hosts, places, num_rows=12)


@pytest.mark.parametrize("num_rows", [300, 2000])
def test_ranks_cluster_as_one_with_wide_assignments_and_losslessly(ranks2: RankPool, num_rows: int) -> None:
    """int16 assignments, which gloo does not know; at 2000 rows there are more rows than ids."""
    check_number_of_ranks(ranks2, "row_wise", num_rows)


# --- optimizer state -------------------------------------------------------------------------------------------------


def train(dmp: nn.Module, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    for step in range(3):
        if optimizer is not None:
            optimizer.zero_grad()
        loss_of(dmp(batch(torch.Generator().manual_seed(10 * step + rank), 6))).backward()
        if optimizer is not None:
            optimizer.step()


def carried(old_R: Tensor, before: State, after: State, table: str, column: int) -> Tensor:
    """Mean old state over the ids that use each new row, id by id."""
    prefix = f"collection._row_maps.{table}."
    old_main, new_main = (state[prefix + "assignments"].tolist() for state in (before, after))
    num_rows, levels = {"a": (12, 1), "b": (7, 1), "r": (6, 2)}[table]
    num_main = num_rows * levels
    ids = torch.arange(len(old_main))
    num_helper = len(old_R) - num_main
    old_helper, new_helper = (
        hash_rows(ids, state[prefix + "helper_coefficients"], num_helper)[column].tolist() for state in (before, after)
    )
    inherited: list[list[Tensor]] = [[] for _ in range(len(old_R))]
    for v in ids.tolist():
        for level in range(levels):
            new_row, old_row = (level * num_rows + main[v][column * levels + level] for main in (new_main, old_main))
            inherited[new_row].append(old_R[old_row])
        inherited[num_main + new_helper[v]].append(old_R[num_main + old_helper[v]])
    return torch.stack([torch.stack(values).mean(0) if values else torch.zeros_like(old_R[0]) for values in inherited])


def expected_state(old: Tensor, before: State, after: State, name: str, mode: str, shards: int) -> Tensor:
    table, _, column = name.partition(":")
    if table == "plain":
        return old
    if mode == "reset":
        return torch.zeros_like(old)
    if old.dim() == 2:
        return carried(old, before, after, table, int(column))
    parts = [carried(part_R, before, after, table, int(column)) for part_R in old.view(shards, -1)]
    return torch.cat(parts)


def check_state(
    before: State, after: State, old: State, new: State, mode: str, placements: dict[str, Placement], names: list[str]
) -> None:
    assert sorted(new) == sorted(old) == sorted(names)
    for name in names:
        assert float(old[name].abs().max()) > 0
        expected = expected_state(old[name], before, after, name, mode, placements[name].column_shards)
        torch.testing.assert_close(new[name], expected, rtol=1e-5, atol=1e-8)


def check_fused(rank: int, world_size: int, places: str, config: ReclusterConfig) -> None:
    model = Model(tables())
    placements = placements_of(world_size, places)
    dmp = sharded(world_size, places, model)
    names = [name for name, place in placements.items() if place.sharding_type != "data_parallel"]
    replicated = [parameter for name, parameter in codebooks(dmp).items() if name not in names]
    optimizer = RowWiseAdagrad(replicated, lr=LEARNING_RATE, eps=EPS) if replicated else None
    train(dmp, rank, optimizer)
    before, old, old_replicated = whole_state(dmp), whole_fused_sums(dmp), whole_optimizer_state(dmp, optimizer, "sum")
    recluster(dmp, seed=1, config=config, optimizer=optimizer)
    after, new, new_replicated = whole_state(dmp), whole_fused_sums(dmp), whole_optimizer_state(dmp, optimizer, "sum")
    mode = config.optimizer_state
    check_state(before, after, old, new, mode, placements, names)
    others = [name for name in placements if name not in names]
    check_state(before, after, old_replicated, new_replicated, mode, placements, others)
    train(dmp, rank, optimizer)  # goes on


@pytest.mark.parametrize("config", [RESET, CONFIG], ids=lambda config: config.optimizer_state)
@pytest.mark.parametrize("places", [*ON_2])
def test_fused_rowwise_adagrad(ranks2: RankPool, places: str, config: ReclusterConfig) -> None:
    ranks2.run(check_fused, places, config)


@pytest.mark.parametrize("places", ["grid_shard", "table_row_wise", "mixed"])
def test_fused_rowwise_adagrad_is_carried_on_2_hosts(two_hosts: RankPool, places: str) -> None:
    two_hosts.run(check_fused, places, CONFIG)


def check_dense(rank: int, world_size: int, kind: str, places: str, config: ReclusterConfig) -> None:
    model = Model(tables())
    placements = placements_of(world_size, places)
    placements = {n: Placement(p.sharding_type, p.ranks, p.column_shards, "dense") for n, p in placements.items()}
    dmp = shard(model, placements)
    optimizer = DENSE[kind]([p for p in codebooks(dmp).values() if p.numel()])
    train(dmp, rank, optimizer)
    kinds = {"adam": ("exp_avg", "exp_avg_sq"), "rowwise_adagrad": ("sum",)}[kind]
    before, old = whole_state(dmp), [whole_optimizer_state(dmp, optimizer, kind) for kind in kinds]
    recluster(dmp, seed=1, config=config, optimizer=optimizer)
    after, new = whole_state(dmp), [whole_optimizer_state(dmp, optimizer, kind) for kind in kinds]
    for was, now in zip(old, new, strict=True):
        check_state(before, after, was, now, config.optimizer_state, placements, list(placements))
    steps = {name: int(optimizer.state[p]["step"]) for name, p in codebooks(dmp).items() if p.numel()}
    anew = 0 if config.optimizer_state == "reset" else 3  # what is not kept by row starts anew as well
    assert steps == {name: 3 if name == "plain" else anew for name in steps}


DENSE = {
    "adam": partial(torch.optim.Adam, lr=LEARNING_RATE),
    "rowwise_adagrad": partial(RowWiseAdagrad, lr=LEARNING_RATE, eps=EPS),
}


@pytest.mark.parametrize("config", [RESET, CONFIG], ids=lambda config: config.optimizer_state)
@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise"])
@pytest.mark.parametrize("kind", DENSE)
def test_dense_optimizers(ranks2: RankPool, kind: str, places: str, config: ReclusterConfig) -> None:
    ranks2.run(check_dense, kind, places, config)


# --- failures --------------------------------------------------------------------------------------------------------


def raise_at_call(function: Callable, number: int) -> Callable:
    """The function, except that its n-th call raises."""
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise MemoryError("a cat on the keyboard")
        return function(*args, **kwargs)

    return counting


def everything(dmp: nn.Module) -> tuple[State, State]:
    return whole_state(dmp), whole_fused_sums(dmp)


def check_failure(rank: int, world_size: int, places: str, where: str, number: int, failing_rank: int) -> int:
    module_name, _, attribute = where.rpartition(".")
    module = import_module(module_name)
    reference, model = Model(tables()), Model(tables())
    dmp = sharded(world_size, places, model)
    train(dmp, rank, None)
    old_state, old_sums = everything(dmp)
    function = raise_at_call(getattr(module, attribute), number if rank == failing_rank else -1)
    started = time.monotonic()
    with (
        mock.patch.object(module, attribute, side_effect=function) as patched,
        pytest.raises(RuntimeError, match=f"rank {failing_rank}: MemoryError: a cat on the keyboard") as caught,
    ):
        recluster(dmp, seed=1, config=CONFIG)
    assert time.monotonic() - started < 10
    assert isinstance(caught.value.__cause__, MemoryError) == (rank == failing_rank)
    torch.testing.assert_close(everything(dmp), (old_state, old_sums), rtol=0, atol=0)
    reference.load_state_dict(old_state)
    recluster(reference, seed=1, config=CONFIG)
    recluster(dmp, seed=1, config=RESET)
    new_state, new_sums = everything(dmp)
    torch.testing.assert_close(new_state, frozen(reference.state_dict()), rtol=1e-4, atol=1e-5)
    assert all(float(sums.abs().max()) == 0 for name, sums in new_sums.items() if name != "plain")
    return patched.call_count


FAILURES = [
    ("cce_torchrec.recluster.table_sums.assign_nearest", 3),  # in the first table
    ("cce_torchrec.recluster.table_sums.assign_nearest", 14),  # in the second one, when the first is done
    ("cce_torchrec.recluster.stores.assemble", 1),  # while codebooks are gathered
    ("cce_torchrec.recluster.stores.assemble", 6),
    ("cce_torchrec.recluster.collectives._room_for", 2),  # between what ranks tell of an exchange and the exchange
    ("cce_torchrec.recluster.kmeans._local_statistics", 2),
    ("cce_torchrec.recluster.table.gather_assignments", 2),
]


@pytest.mark.parametrize(("where", "number"), FAILURES)
def test_one_rank_fails_and_nothing_changes(ranks2: RankPool, where: str, number: int) -> None:
    calls = ranks2.run(check_failure, "table_wise", where, number, 1)
    assert calls[1] == number  # it did fail there


@pytest.mark.parametrize("places", ["row_wise", "column_wise"])
def test_one_rank_fails_and_nothing_changes_whatever_the_sharding(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_failure, places, *FAILURES[0], 0)


@pytest.mark.parametrize(("where", "number"), [FAILURES[0], FAILURES[5]])
def test_one_of_4_ranks_fails_and_nothing_changes(two_hosts: RankPool, where: str, number: int) -> None:
    """Fits are shared by 4 ranks, as there are 2 columns; of 2 ranks each fits a column."""
    two_hosts.run(check_failure, "row_wise", where, number, 2)


class TwoCollections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Model(tables()).collection, Model(tables()).collection


def check_failure_in_second(rank: int, world_size: int) -> None:
    dmp = sharded(world_size, "row_wise", TwoCollections(), paths=["first", "second"])
    old = whole_state(dmp)
    function = raise_at_call(table_module.assign_nearest, 20 if rank == 1 else -1)  # a collection takes 16
    with (
        mock.patch.object(table_module, "assign_nearest", side_effect=function) as patched,
        pytest.raises(RuntimeError, match="rank 1: MemoryError"),
    ):
        recluster(dmp, seed=1, config=CONFIG)
    assert rank == 0 or patched.call_count == 20
    torch.testing.assert_close(whole_state(dmp), old, rtol=0, atol=0)
    recluster(dmp, seed=1, config=CONFIG)
    new = whole_state(dmp)
    assert all(not torch.equal(new[name], old[name]) for name in new if name.endswith(("assignments", "version")))


def test_a_failure_in_one_collection_leaves_all_alone(ranks2: RankPool) -> None:
    ranks2.run(check_failure_in_second)


def check_nan(rank: int, world_size: int, places: str) -> None:
    model = Model(tables())
    with torch.no_grad():
        model.collection.codebook("b:1")[3, 2] = torch.nan
    dmp = sharded(world_size, places, model)
    old = everything(dmp)
    with pytest.raises(ValueError, match=r"Table 'b': 1 of .* weights of column 1 are NaN or infinite"):
        recluster(dmp, seed=1, config=CONFIG)
    torch.testing.assert_close(everything(dmp), old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise", "table_wise_one_rank"])
def test_nan_is_an_error_on_all_ranks(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_nan, places)
