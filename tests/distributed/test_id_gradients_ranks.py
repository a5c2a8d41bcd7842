"""Gradients recorded on several ranks steer a re-clustering as those of one process do, also from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cce_torchrec import recluster, record_gradients
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.recluster.recorded import save_recorded
from tests.distributed.harness import RankPool
from tests.distributed.models import ON_2, Model, batch
from tests.distributed.reference import loss_of, whole_state
from tests.distributed.test_recluster_ranks import CONFIG, State, assert_same_clustering, frozen, sharded, tables

pytestmark = pytest.mark.distributed

BATCH_SIZES = (5, 9)  # of the ranks


def record(model: nn.Module, rank: int) -> None:
    """Three batches of a rank, which change nothing: fused optimizers would train the sharded tables."""
    for step in range(3):
        features = batch(torch.Generator().manual_seed(10 * step + rank), BATCH_SIZES[rank])
        loss_of(model(features)).backward()


def rows_of(report: Any) -> list[tuple[str, int, float]]:
    return [(table.table, table.version, table.relative_squared_error) for table in report.tables]


def build(rank: int, world_size: int, places: str, state: State) -> nn.Module:
    model = Model(tables())
    model.load_state_dict(state)
    dmp = sharded(world_size, places, model)
    for group in dmp.fused_optimizer.param_groups:
        group["lr"] = 0.0  # what is looked up stays as it was
    dmp.fused_optimizer.zero_grad()
    return dmp


def recluster_recorded(rank: int, world_size: int, places: str, state: State) -> Any:
    dmp = build(rank, world_size, places, state)
    record_gradients(dmp)
    record(dmp, rank)
    report = recluster(dmp, seed=1, config=CONFIG)
    return whole_state(dmp), rows_of(report)


def expected(state: State) -> tuple[Model, list]:
    model = Model(tables())
    model.load_state_dict(state)
    record_gradients(model)
    for rank in range(2):
        record(model, rank)
    return model, rows_of(recluster(model, seed=1, config=CONFIG))


def start() -> State:
    torch.manual_seed(0)
    return frozen(Model(tables()).state_dict())


@pytest.mark.parametrize("places", [*ON_2])
def test_2_ranks_steer_as_one_process(ranks2: RankPool, places: str) -> None:
    state = start()
    model, reports = expected(state)
    unsteered = Model(tables())
    unsteered.load_state_dict(state)
    recluster(unsteered, seed=1, config=CONFIG)
    assert not torch.allclose(model.collection.dense_weight("a"), unsteered.collection.dense_weight("a"))
    for result in ranks2.run(recluster_recorded, places, state):
        assert_same_clustering(*result, model, reports)


def save_after_recording(rank: int, world_size: int, state: State, folder: str) -> None:
    dmp = build(rank, world_size, "mixed", state)
    record_gradients(dmp)
    record(dmp, rank)
    save_checkpoint(folder, dmp)


def load_and_recluster(rank: int, world_size: int, state: State, folder: str) -> Any:
    dmp = build(rank, world_size, "row_wise", {name: torch.zeros_like(value) for name, value in state.items()})
    load_checkpoint(folder, dmp)
    report = recluster(dmp, seed=1, config=CONFIG)
    return whole_state(dmp), rows_of(report)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_recorded_gradients_come_back_from_a_checkpoint(ranks2: RankPool, tmp_path: Path) -> None:
    state = start()
    model, reports = expected(state)
    ranks2.run(save_after_recording, state, str(tmp_path))
    assert len(list(tmp_path.glob("id_gradients_*.pt"))) == 2
    for result in ranks2.run(load_and_recluster, state, str(tmp_path)):
        assert_same_clustering(*result, model, reports)
    alone = Model(tables())
    load_checkpoint(tmp_path, alone)
    report = recluster(alone, seed=1, config=CONFIG)
    assert_same_clustering(alone.state_dict(), rows_of(report), model, reports)
    record_gradients(alone, on=False)
    save_recorded(tmp_path, alone, rank=0, world_size=1)  # fewer ranks, and nothing to save
    assert not list(tmp_path.glob("id_gradients_*.pt"))


def record_on_one_rank(rank: int, world_size: int) -> None:
    dmp = sharded(world_size, "mixed", Model(tables()))
    record_gradients(dmp, on=rank == 1)
    with pytest.raises(RuntimeError, match="1 of 2 ranks have recorded gradients: call record_gradients on all ranks"):
        recluster(dmp, seed=1, config=CONFIG)


def test_all_ranks_record_or_none_does(ranks2: RankPool) -> None:
    ranks2.run(record_on_one_rank)
