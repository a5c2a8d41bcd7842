"""Replicated codebooks: optimizers applied in backward to them, and assignments sharded by id, equal unsharded training.

Batches are as large on every rank where sums are reduce-scattered (see test_sharding_parity.py).
"""

import dataclasses

import pytest
import torch
from torch import nn
from torchrec import optim as torchrec_optim
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import ReclusterConfig, parameter_constraints, recluster
from cce_torchrec.distributed.id_sharding import block_of_ids
from tests.distributed.harness import RankError, RankPool
from tests.distributed.models import (
    DATA_PARALLEL,
    EPS,
    LEARNING_RATE,
    Model,
    Placement,
    batch,
    mixed_tables,
    physical_tables,
    row_wise,
    shard,
    table_wise,
)
from tests.distributed.reference import (
    RowwiseAdagrad,
    codebooks,
    loss_of,
    train_step,
    whole_fused_sums,
    whole_state,
)

pytestmark = pytest.mark.distributed


WITH_ASSIGNMENTS = ("cce", "residual", "pq")


def tables_with(assignments: str, sign: bool = False) -> list[EmbeddingBagConfig]:
    """The mixed tables; those with assignments have them placed as asked, so that 2 and 4 ranks have uneven blocks."""
    return [
        dataclasses.replace(table, assignment_placement=assignments) if table.name in WITH_ASSIGNMENTS else table
        for table in mixed_tables(sign)
    ]


def places(names: list[str], rest: Placement | None, world_size: int) -> dict[str, Placement]:
    """Codebooks that may have sharded assignments replicated, the others as ``rest`` or mixed."""
    mixed = [row_wise(world_size), table_wise(1), DATA_PARALLEL]
    return {
        name: DATA_PARALLEL if name.startswith(WITH_ASSIGNMENTS) else rest or mixed[index % 3]
        for index, name in enumerate(names)
    }


def in_backward_model(tables: list[EmbeddingBagConfig], device: str = "cpu") -> Model:
    model = Model(tables, device=device)
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": LEARNING_RATE, "eps": EPS})
    return model


def check_training(rank: int, world_size: int, assignments: str, rest: Placement | None, sign: bool = False) -> None:
    """Nothing but backward trains the model, and then a re-clustering carries its optimizer state."""
    reference = Model(mixed_tables(sign))
    model = in_backward_model(tables_with(assignments, sign))
    model.load_state_dict(reference.state_dict())
    dmp = shard(model, places(physical_tables(model.collection), rest, world_size))
    assert not dict(in_backward_optimizer_filter(dmp.named_parameters()))
    theirs = RowwiseAdagrad(reference, {})
    for step in range(4):
        batches = [batch(torch.Generator().manual_seed(10 * step + r), 5 + 2 * r) for r in range(world_size)]
        expected = train_step(reference, batches)[rank]
        theirs.step()
        pooled = dmp(batches[rank])
        torch.testing.assert_close(pooled.to_dict(), expected.to_dict(), rtol=1e-4, atol=1e-5)
        loss_of(pooled).backward()
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole_fused_sums(dmp), theirs.sums, rtol=1e-4, atol=1e-6)
    config = ReclusterConfig(optimizer_state="carry")
    holder = _OptimizerState(reference, theirs)
    recluster(reference, seed=3, config=config, optimizer=holder)  # type: ignore[arg-type]
    recluster(dmp, seed=3, config=config)
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole_fused_sums(dmp), theirs.sums, rtol=1e-4, atol=1e-6)


class _OptimizerState:
    """The sums of the reference's optimizer, as ``recluster`` looks for them."""

    def __init__(self, model: nn.Module, optimizer: RowwiseAdagrad) -> None:
        self.param_groups: list = []
        self.state = {weight: {"sum": optimizer.sums[name]} for name, weight in codebooks(model).items()}


@pytest.mark.parametrize("rest", [DATA_PARALLEL, None], ids=["data_parallel", "mixed"])
@pytest.mark.parametrize("assignments", ["replicated", "sharded"])
def test_training_in_backward_on_2_ranks(ranks2: RankPool, assignments: str, rest: Placement | None) -> None:
    ranks2.run(check_training, assignments, rest)


def test_training_with_signs_beside_sharded_assignments(ranks2: RankPool) -> None:
    ranks2.run(check_training, "sharded", None, True)


def test_training_in_backward_on_4_ranks(ranks4: RankPool) -> None:
    ranks4.run(check_training, "sharded", None)


def check_schedule(rank: int, world_size: int, learning_rates: list[float]) -> None:
    """Learning rates that are changed after sharding, as schedulers do; tables take turns with those of the list."""
    reference, lr = Model(mixed_tables()), learning_rates[0]
    model = Model(mixed_tables())
    apply_optimizer_in_backward(torch.optim.SGD, model.collection.parameters(), {"lr": LEARNING_RATE})
    model.load_state_dict(reference.state_dict())
    dmp = shard(model, dict.fromkeys(physical_tables(model.collection), DATA_PARALLEL))
    for index, group in enumerate(dmp.fused_optimizer.param_groups):
        group["lr"] = learning_rates[index % len(learning_rates)]
    batches = [batch(torch.Generator().manual_seed(r), 5) for r in range(world_size)]
    train_step(reference, batches)
    torch.optim.SGD(reference.parameters(), lr=lr).step()
    loss_of(dmp(batches[rank])).backward()
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)


def test_learning_rates_can_be_scheduled(ranks2: RankPool) -> None:
    ranks2.run(check_schedule, [LEARNING_RATE / 3])


def test_tables_that_step_together_have_one_learning_rate(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"step together but were given different options.*before sharding"):
        ranks2.run(check_schedule, [0.1, 0.2])


def check_blocks(rank: int, world_size: int) -> None:
    """A rank holds its block of ids only, also when built on meta, and then equal to what a CPU build has."""
    whole = Model(mixed_tables()).collection.lowered_tables[0].row_map.assignments
    for device in ("cpu", "meta"):
        model = Model(tables_with("sharded"), device=device)
        dmp = shard(model, places(physical_tables(model.collection), None, world_size))
        held = dmp.module.collection.lowered_tables[0].row_map
        start, end = block_of_ids(101, rank, world_size)
        assert end - start == (26, 26, 26, 23)[rank]
        torch.testing.assert_close(held.assignments, whole[start:end])
        assert dmp.module.collection.memory_report().tables[0].assignment_bytes == held.stored_bytes()
        assert held.stored_bytes() - whole.numel() < 100, "the assignments of all ids, and a few coefficients"


def test_each_rank_holds_its_block_of_assignments(ranks4: RankPool) -> None:
    ranks4.run(check_blocks)


def check_id_sharded_codebooks_must_be_replicated(rank: int, world_size: int) -> None:
    model = Model(tables_with("sharded"))
    shard(model, {name: table_wise(0) for name in physical_tables(model.collection)})


def test_id_sharded_codebooks_must_be_replicated(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"'cce' has assignment_placement='sharded'.*'table_wise'.*data_parallel"):
        ranks2.run(check_id_sharded_codebooks_must_be_replicated)


def check_planned(rank: int, world_size: int) -> None:
    """TorchRec's planner leaves the codebooks of an id-sharded table replicated."""
    from cce_torchrec import CompressedEmbeddingBagCollectionSharder

    model = Model(tables_with("sharded"), device="meta")
    planner = EmbeddingShardingPlanner(constraints=parameter_constraints(model))
    plan = planner.collective_plan(model, [CompressedEmbeddingBagCollectionSharder()], torch.distributed.group.WORLD)
    entries = plan.plan["collection"]
    assert set(entries) == set(physical_tables(model.collection))
    assert {entries[name].sharding_type for name in ("cce:0", "cce:1")} == {"data_parallel"}


def test_planner_replicates_id_sharded_codebooks(ranks2: RankPool) -> None:
    ranks2.run(check_planned)


def check_unknown_optimizer(rank: int, world_size: int) -> None:
    model = Model()
    apply_optimizer_in_backward(torchrec_optim.LAMB, model.collection.parameters(), {"lr": 0.1})
    shard(model, dict.fromkeys(physical_tables(model.collection), DATA_PARALLEL))


def test_an_optimizer_that_cannot_step_is_an_error(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match="LAMB cannot be applied in backward"):
        ranks2.run(check_unknown_optimizer)
