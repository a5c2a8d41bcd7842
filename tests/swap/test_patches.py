"""What is patched while a script runs, what that does to a model, and that it is gone afterwards."""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import model_parallel, sharding_plan
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Topology

from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressionRule,
    ReclusterSchedule,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.swap import register_sharders
from cce_torchrec.swap.config import SwapConfig
from cce_torchrec.swap.patches import swapped
from cce_torchrec.swap.sharders import restore_sharders

CPU = torch.device("cpu")
RULES = (CompressionRule(method="cce", min_num_embeddings=100, options={"num_rows": 8, "num_columns": 2}),)
SCHEDULE = ReclusterSchedule(total_steps=None, every_steps=2, seed=3)
CONFIG = SwapConfig(rules=RULES, schedule=SCHEDULE)
TABLES = [
    EmbeddingBagConfig(name="big", num_embeddings=200, embedding_dim=8, feature_names=["f"]),
    EmbeddingBagConfig(name="small", num_embeddings=20, embedding_dim=8, feature_names=["g"]),
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*The topology was constructed directly:UserWarning", "ignore:.*is_fx_tracing:UserWarning"
)


class Model(nn.Module):
    """A collection, and a dense layer; the loss of a batch."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection, self.over = collection, nn.Linear(16, 1)

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.collection(ids)
        return self.over(torch.cat([pooled["f"], pooled["g"]], dim=1)).sigmoid().square().mean()


def batch(step: int) -> KeyedJaggedTensor:
    drawn = torch.Generator().manual_seed(step)
    ids = [torch.randint(size, (16,), generator=drawn) for size in (200, 20)]
    return KeyedJaggedTensor(["f", "g"], torch.cat(ids), lengths=torch.ones(32, dtype=torch.int32))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_collections_by_rule() -> None:
    with swapped(CONFIG):
        ours = EmbeddingBagCollection(tables=TABLES, device=torch.device("meta"))
        plain = EmbeddingBagCollection(tables=TABLES[1:])
        own = CompressedEmbeddingBagCollection(
            tables=[CompressedEmbeddingBagConfig(**vars(TABLES[0]), method=CCE(num_rows=200, num_columns=2))]
        )
        positional = EmbeddingBagCollection(TABLES, True)
    assert type(ours) is type(positional) is CompressedEmbeddingBagCollection
    assert ours.device.type == "meta"
    assert positional.is_weighted()
    assert type(ours._embedding_bag_collection) is EmbeddingBagCollection
    assert type(plain) is EmbeddingBagCollection
    assert own.codebook("big:0").shape == (400, 4), "codebooks are no tables for rules"
    assert [type(table).__name__ for table in ours.embedding_bag_configs()] == [
        "CompressedEmbeddingBagConfig",
        "EmbeddingBagConfig",
    ]


def test_a_subclass_is_left_alone() -> None:
    class Special(EmbeddingBagCollection):
        pass

    with swapped(CONFIG):
        assert type(Special(tables=TABLES)) is Special


def test_all_is_gone_afterwards() -> None:
    found = {
        owner: dict(vars(owner))
        for owner in (EmbeddingBagCollection, EmbeddingShardingPlanner, DistributedModelParallel)
    }
    hooks = dict(_global_optimizer_post_hooks)

    def fail() -> None:
        with swapped(CONFIG):
            assert all(dict(vars(owner)) != before for owner, before in found.items())
            assert inspect.signature(EmbeddingBagCollection).parameters.keys() >= {"tables", "is_weighted", "device"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {owner: dict(vars(owner)) for owner in found} == found
    assert _global_optimizer_post_hooks == hooks
    assert type(EmbeddingBagCollection(tables=TABLES)) is EmbeddingBagCollection


def names(sharders: list[Any]) -> list[str]:
    return [type(sharder).__name__ for sharder in sharders]


def test_registering_sharders() -> None:
    before = names(get_default_sharders())
    register_sharders()
    register_sharders()
    try:
        found = names(get_default_sharders())  # imported by name above
        assert found == names(model_parallel.get_default_sharders()) == names(sharding_plan.get_default_sharders())
        assert found == ["CompressedEmbeddingBagCollectionSharder", *before] == names(get_sharders())
    finally:
        restore_sharders()
    assert names(get_default_sharders()) == before == names(model_parallel.get_default_sharders())


def train(model: Model, dmp_of: Any, after_step: Any) -> list[float]:
    dmp = dmp_of(model)
    optimizer = torch.optim.Adagrad(dmp.parameters(), lr=0.5)
    losses = []
    for step in range(7):
        optimizer.zero_grad()
        for half in range(2):  # gradients accumulate over two passes
            loss = dmp(batch(2 * step + half))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        with torch.no_grad():
            dmp(batch(0))  # evaluation is no step
        after_step(step + 1, dmp, optimizer=optimizer)
    return losses


@pytest.mark.usefixtures("one_rank")
def test_the_same_training_as_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """With default sharders and planner, and the schedule called explicitly where the hook does it by itself."""
    torch.manual_seed(0)
    with swapped(CONFIG):
        model = Model(EmbeddingBagCollection(tables=TABLES))
        swapped_in = train(model, lambda model: DistributedModelParallel(model, device=CPU), lambda *_, **__: None)
    printed = capsys.readouterr().out
    torch.manual_seed(0)
    tables = [CompressedEmbeddingBagConfig(**vars(TABLES[0]), method=CCE(num_rows=8, num_columns=2)), TABLES[1]]
    model = Model(CompressedEmbeddingBagCollection(tables=tables))

    def by_hand(model: Model) -> DistributedModelParallel:
        topology = Topology(world_size=1, compute_device="cpu")
        constraints = parameter_constraints(model, batch_size=512)
        plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, get_sharders())
        return DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_sharders())

    expected = train(model, by_hand, SCHEDULE.step)
    assert swapped_in == expected
    without = train(Model(CompressedEmbeddingBagCollection(tables=tables)), by_hand, lambda *_, **__: None)
    assert without[4:] != expected[4:]
    assert [f"re-clustered after step {step}:" in printed for step in range(1, 8)] == [False, True] * 3 + [False]


@pytest.mark.usefixtures("one_rank")
def test_ids_are_counted_where_methods_ask_for_it() -> None:
    """Those of the training passes before a re-clustering, none of evaluation."""
    options = {"num_rows": 8, "num_columns": 2, "num_assigned_ids": 20, "min_id_count": 2}
    rule = CompressionRule(method="cce", min_num_embeddings=100, options=options)
    warm_ids, counts = [], Counter()

    def after_step(step: int, dmp: nn.Module, **_: object) -> None:
        warm = dmp.module.collection.lowered_tables[0].row_map.warm_ids
        warm_ids.append(warm[warm >= 0].tolist())

    with swapped(SwapConfig(rules=(rule,), schedule=SCHEDULE)):
        model = Model(EmbeddingBagCollection(tables=TABLES))
        train(model, lambda model: DistributedModelParallel(model, device=CPU), after_step)
    for step in range(7):
        before = sorted((v for v in counts if counts[v] >= 2), key=lambda v: (-counts[v], v))
        if step in (2, 4, 6):
            assert warm_ids[step] == sorted(before[:20]) != warm_ids[step - 1]
        counts.update(v for half in range(2) for v in batch(2 * step + half)["f"].values().tolist())


@pytest.mark.usefixtures("one_rank")
def test_other_sharders_are_refused() -> None:
    with swapped(CONFIG):
        model = Model(EmbeddingBagCollection(tables=TABLES))
        plan = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu")).plan(
            model, get_default_sharders()
        )
        for given in (None, plan):  # with the plan, TorchRec itself would say KeyError
            with pytest.raises(ValueError, match=r"sharders of its own.*take get_default_sharders\(\)"):
                DistributedModelParallel(model, device=CPU, plan=given, sharders=[EmbeddingBagCollectionSharder()])
        DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())


def test_the_planner_takes_constraints_by_logical_table() -> None:
    topology, kinds = Topology(world_size=2, compute_device="cpu"), {}
    with swapped(CONFIG):
        model = Model(EmbeddingBagCollection(tables=TABLES))
        for kind in ("table_wise", "column_wise"):
            planner = EmbeddingShardingPlanner(
                topology=topology,
                constraints={"big": ParameterConstraints(sharding_types=[kind], min_partition=4)},
                storage_reservation=FixedPercentageStorageReservation(percentage=0.1),
            )
            for _ in range(2):  # it may be asked again
                (of_module,) = planner.plan(model, get_default_sharders()).plan.values()
            kinds[kind] = {name: of_table.sharding_type for name, of_table in of_module.items()}  # type: ignore[attr-defined]
    assert kinds["table_wise"] == {"big:0": "table_wise", "big:1": "table_wise", "small": "data_parallel"}
    assert set(kinds["column_wise"].values()) <= {"column_wise", "table_wise", "data_parallel"}
    assert kinds["column_wise"]["big:0"] == "column_wise"


@pytest.mark.parametrize(
    ("tables", "says"), [(TABLES[1:], r"no rule matches a table of \['small'\]"), (TABLES, "nothing was re-clustered")]
)
def test_what_was_not_done_is_said(tables: Any, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with swapped(CONFIG) as swap:
        EmbeddingBagCollection(tables=tables)
        swap.finish()
    assert re.search(says, capsys.readouterr().out)


def test_a_rule_that_does_not_fit_names_the_table() -> None:
    rule = CompressionRule(method="cce", options={"num_rows": 8, "num_columns": 3})
    with (
        swapped(SwapConfig(rules=(rule,), schedule=None)),
        pytest.raises(ValueError, match=r"Table 'big'.*nearest numbers of columns"),
    ):
        EmbeddingBagCollection(tables=TABLES)
