"""Re-clustering on another thread on 2 ranks gives what it gives on one, beside the collectives of training."""

import dataclasses
import threading
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.model_parallel import DistributedModelParallel

from cce_torchrec import CompressedEmbeddingBagConfig, recluster, recluster_in_background
from cce_torchrec.methods import CCE, CCERobe
from cce_torchrec.recluster import background
from cce_torchrec.recluster.work import CollectionWork
from tests.distributed.harness import RankPool
from tests.distributed.models import DIM, ROWWISE_ADAGRAD, Model, batch, physical_tables, shard
from tests.distributed.models import ON_2 as PLACES
from tests.distributed.reference import loss_of, whole_state
from tests.distributed.test_recluster_ranks import CONFIG, State, frozen, raise_at_call
from tests.distributed.test_recluster_ranks import tables as plain_tables

pytestmark = pytest.mark.distributed


def tables(shard_assignments: bool = False) -> list[EmbeddingBagConfig]:
    """With one of each kind that a commit treats in its own way."""
    more = [("w", "l", CCERobe(num_cells=64, num_columns=2)), ("s", "n", CCE(num_rows=9, num_columns=2, num_hot_ids=4))]
    found = [
        *plain_tables(),
        *(
            CompressedEmbeddingBagConfig(
                name=name, num_embeddings=301, embedding_dim=DIM, feature_names=[feature], method=method
            )
            for name, feature, method in more
        ),
    ]
    if shard_assignments:
        found[0] = dataclasses.replace(found[0], assignment_placement="sharded")
    return found


def sharded(model: nn.Module, places: str) -> DistributedModelParallel:
    placements = PLACES[places](physical_tables(model.collection))
    return shard(model, placements, fused_params=ROWWISE_ADAGRAD)


def learn(module: nn.Module) -> None:
    """What every rank can do to its part of any parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.5


def trained_between(rank: int, world_size: int, places: str, shard_assignments: bool, state: State) -> Any:
    model = Model(tables(shard_assignments))
    model.load_state_dict(state)
    dmp = sharded(model, places)
    for seed in (1, 2):
        under_way = recluster_in_background(dmp, seed=seed, config=CONFIG)
        for step in range(3):  # its all-to-alls go over another group
            dmp(batch(torch.Generator().manual_seed(10 * step + rank), 6))
        learn(dmp)
        report = under_way.commit()
    return whole_state(dmp), [table.relative_squared_error for table in report.tables]


@pytest.mark.parametrize(
    ("places", "shard_assignments"),
    [(places, False) for places in ("table_wise", "column_wise", "row_wise", "mixed")]
    + [("data_parallel", False), ("data_parallel", True)],
)
def test_2_ranks_commit_what_one_does(ranks2: RankPool, places: str, shard_assignments: bool) -> None:
    torch.manual_seed(0)
    expected = Model(tables())
    state = frozen(expected.state_dict())
    for seed in (1, 2):
        under_way = recluster_in_background(expected, seed=seed, config=CONFIG)
        learn(expected)
        report = under_way.commit()
    errors = [table.relative_squared_error for table in report.tables]
    results = ranks2.run(trained_between, places, shard_assignments, state)
    for found, found_errors in results:
        torch.testing.assert_close(found, results[0][0], rtol=0, atol=0)
        actual = Model(tables())
        actual.load_state_dict(found)
        for table in ("a", "plain", "b", "r", "w", "s"):
            ours, theirs = actual.collection.dense_weight(table), expected.collection.dense_weight(table)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert found_errors == pytest.approx(errors, rel=1e-4)


# --- failures --------------------------------------------------------------------------------------------------------


def check_failure(rank: int, world_size: int, module: str, name: str, number: int) -> None:
    where = import_module(f"cce_torchrec.recluster.{module}")
    dmp = sharded(Model(tables()), "row_wise")
    old = whole_state(dmp)
    function = raise_at_call(getattr(where, name), number if rank == 1 else -1)
    with mock.patch.object(where, name, side_effect=function):
        under_way = recluster_in_background(dmp, seed=1, config=CONFIG)
        with pytest.raises(RuntimeError, match="rank 1: MemoryError: a cat on the keyboard"):
            under_way.commit()
    torch.testing.assert_close(whole_state(dmp), old, rtol=0, atol=0)
    assert recluster(dmp, seed=1, config=CONFIG).tables[0].version == 1  # nothing is under way


def test_a_rank_that_fails_while_it_computes_changes_nothing(ranks2: RankPool) -> None:
    ranks2.run(check_failure, "table_sums", "assign_nearest", 3)


def test_a_rank_that_fails_when_it_commits_changes_nothing(ranks2: RankPool) -> None:
    ranks2.run(check_failure, "catch_up", "_means", 2)


def check_cancelled(rank: int, world_size: int) -> None:
    """Rank 1 has not begun to compute when both are told to stop."""
    dmp = sharded(Model(tables()), "table_wise")
    old, told = whole_state(dmp), threading.Event()
    compute: Callable[..., None] = CollectionWork.compute

    def later(*args: Any) -> None:
        if rank == 1:
            told.wait()
        compute(*args)

    with mock.patch.object(CollectionWork, "compute", later):
        under_way = recluster_in_background(dmp, seed=1, config=CONFIG)
        threading.Timer(0.2, told.set).start()
        under_way.cancel()
    torch.testing.assert_close(whole_state(dmp), old, rtol=0, atol=0)
    loss_of(dmp(batch(torch.Generator().manual_seed(rank), 6))).backward()


def test_cancelled_on_both_ranks(ranks2: RankPool) -> None:
    ranks2.run(check_cancelled)


def check_timeout(rank: int, world_size: int) -> None:
    """A collective of the thread's group that the other rank does not join."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    own = background._own_group(group)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=own)
    dist.barrier()


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_in_training(ranks2: RankPool) -> None:
    ranks2.run(check_timeout)
