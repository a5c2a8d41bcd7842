"""Checkpoints load under any placement, and the next step is the uninterrupted run's; what does not fit changes nothing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import recluster
from cce_torchrec.checkpoint import checkpoint_state, load_checkpoint, save_checkpoint, save_checkpoint_async
from cce_torchrec.methods import CCE
from tests.distributed.harness import RankPool, run_ranks
from tests.distributed.models import (
    DATA_PARALLEL,
    EPS,
    LEARNING_RATE,
    Model,
    Placement,
    batch,
    column_wise,
    mixed_tables,
    physical_tables,
    row_wise,
    shard,
    table_wise,
)
from tests.distributed.reference import loss_of, whole_fused_sums, whole_state

pytestmark = pytest.mark.distributed

PLACES: dict[str, Callable[[int], Placement]] = {
    "row_wise": row_wise,
    "table_wise": lambda world_size: table_wise(world_size - 1),
    "data_parallel": lambda world_size: DATA_PARALLEL,
    "column_wise": lambda world_size: column_wise(*range(world_size)),
}


def tables(assignments: str, **cce: Any) -> list[EmbeddingBagConfig]:
    """The mixed tables, the CCE one with its assignments placed as asked and some fields of its method replaced."""
    return [
        dataclasses.replace(t, assignment_placement=assignments, method=dataclasses.replace(t.method, **cce))
        if t.name == "cce"
        else t
        for t in mixed_tables()
    ]


def build(place: str, world_size: int, assignments: str = "replicated", **cce: Any) -> nn.Module:
    """A sharded model, its weights random; CCE codebooks are replicated where its assignments are sharded."""
    model = Model(tables(assignments, **cce))
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": LEARNING_RATE, "eps": EPS})
    placements = {name: PLACES[place](world_size) for name in physical_tables(model.collection)}
    if assignments == "sharded":
        placements.update({name: DATA_PARALLEL for name in placements if name.startswith("cce")})
    return shard(model, placements)


def train(dmp: nn.Module, step: int, rank: int, world_size: int) -> None:
    """One step on the global batch of a step, which is the same for any number of ranks: 4 parts, a share each."""
    for part in range(rank, 4, world_size):
        features = batch(torch.Generator().manual_seed(100 * step + part), 3)
        (loss_of(dmp(features)) * world_size / 4).backward()


def snapshot(dmp: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything, whole; collective."""
    return whole_state(dmp), whole_fused_sums(dmp)


def train_and_save(rank: int, world_size: int, path: str, place: str, assignments: str) -> Any:
    """Train, re-cluster, train, save; then what one more step would make of it."""
    dmp = build(place, world_size, assignments)
    for step in range(2):
        train(dmp, step, rank, world_size)
    recluster(dmp, seed=1)
    train(dmp, 2, rank, world_size)
    save_checkpoint(path, dmp, dmp.fused_optimizer)
    saved = snapshot(dmp)
    train(dmp, 3, rank, world_size)
    return saved, snapshot(dmp)


def load_and_train(rank: int, world_size: int, path: str, place: str, assignments: str) -> Any:
    dmp = build(place, world_size, assignments)
    train(dmp, 9, rank, world_size)  # something to be replaced
    load_checkpoint(path, dmp, dmp.fused_optimizer)
    loaded = snapshot(dmp)
    recluster_again = dmp.module.collection.lowered_tables[0].row_map.version
    assert int(recluster_again) == 1
    train(dmp, 3, rank, world_size)
    return loaded, snapshot(dmp)


CASES = [
    (2, "row_wise", "replicated", 2, "table_wise", "replicated"),
    (2, "table_wise", "replicated", 2, "data_parallel", "replicated"),
    (2, "data_parallel", "replicated", 2, "row_wise", "replicated"),
    (2, "column_wise", "replicated", 2, "column_wise", "replicated"),
    (2, "row_wise", "replicated", 2, "row_wise", "sharded"),
    (2, "row_wise", "sharded", 2, "table_wise", "replicated"),
    (2, "row_wise", "replicated", 1, "table_wise", "replicated"),
    (2, "table_wise", "sharded", 1, "row_wise", "sharded"),
    (1, "row_wise", "replicated", 2, "row_wise", "sharded"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_checkpoint_loads_under_another_plan(tmp_path: Path, ranks2: RankPool, case: tuple) -> None:
    world_size, place, assignments, new_world_size, new_place, new_assignments = case

    def run(size: int, fn: Callable, *args: Any) -> Any:
        return (ranks2.run(fn, *args) if size == 2 else run_ranks(1, fn, *args))[0]

    saved, after_step = run(world_size, train_and_save, str(tmp_path), place, assignments)
    loaded, after_loaded_step = run(new_world_size, load_and_train, str(tmp_path), new_place, new_assignments)
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    # One rank takes the parts of a step one after another, each a step of its own.
    if world_size == new_world_size:
        torch.testing.assert_close(after_loaded_step, after_step, rtol=1e-5, atol=1e-6)


def check_refused(rank: int, world_size: int, path: str, place: str, cce: dict[str, Any], message: str) -> None:
    dmp = build(place, world_size, **cce)
    before = snapshot(dmp)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, dmp, dmp.fused_optimizer)
    torch.testing.assert_close(snapshot(dmp), before, rtol=0, atol=0)
    state = checkpoint_state(dmp, dmp.fused_optimizer)
    with pytest.raises(CheckpointException, match=r"Missing key|[Ss]ize mismatch"):
        dcp.load(state, checkpoint_id=path)
    torch.testing.assert_close(snapshot(dmp), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "cce", "message"),
    [
        ("column_wise", {}, "kept once a column shard"),
        (
            "row_wise",
            {"num_rows": 6, "num_helper_rows": 5},
            r"saved from cce\(num_rows=5.*the model has cce\(num_rows=6",
        ),
        ("row_wise", {"num_rows": 7}, r"saved from cce\(num_rows=5.*the model has cce\(num_rows=7"),
        ("row_wise", {"num_columns": 4}, r"num_columns=2.*num_columns=4"),
    ],
    ids=["column_shards", "same_shapes", "other_size", "other_columns"],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, ranks2: RankPool, place: str, cce: dict[str, Any], message: str
) -> None:
    ranks2.run(train_and_save, str(tmp_path), "row_wise", "replicated")
    ranks2.run(check_refused, str(tmp_path), place, cce, message)


def check_async_save(rank: int, world_size: int, path: str) -> None:
    """What is saved is the state at the call, whatever is trained meanwhile."""
    dmp = build("row_wise", world_size)
    train(dmp, 0, rank, world_size)
    saved = snapshot(dmp)
    with pytest.raises(ValueError, match="new_group"):
        save_checkpoint_async(path, dmp, dmp.fused_optimizer)
    group = torch.distributed.new_group(backend="gloo")
    future = save_checkpoint_async(path, dmp, dmp.fused_optimizer, process_group=group)
    train(dmp, 1, rank, world_size)
    future.result()
    other = build("table_wise", world_size)
    train(other, 5, rank, world_size)
    load_checkpoint(path, other, other.fused_optimizer)
    torch.testing.assert_close(snapshot(other), saved, rtol=0, atol=0)


def test_async_save(tmp_path: Path) -> None:
    run_ranks(2, check_async_save, str(tmp_path))


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_checkpoint(tmp_path, Model())


def test_an_unsharded_model_refuses_another_method_and_stays_as_it_is() -> None:
    model = Model(tables("replicated", num_rows=6, num_helper_rows=5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert isinstance(tables("replicated")[0].method, CCE)
    with pytest.raises(ValueError, match=r"'cce'.*num_rows=5.*num_rows=6"):
        model.load_state_dict(Model(tables("replicated")).state_dict())
    torch.testing.assert_close(dict(model.state_dict()), before)
