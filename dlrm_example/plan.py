"""Where the tables go: what TorchRec's planner is told, and its plan as a table of text."""

import dataclasses

import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedStorageReservation,
    get_sharders,
    parameter_constraints,
)
from dlrm_example.report import text_table

NOT_BY_ROW = [ShardingType.DATA_PARALLEL.value, ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]


def make_plan(
    model: nn.Module, collection: CompressedEmbeddingBagCollection, batch_size: int, group: dist.ProcessGroup
) -> tuple[ShardingPlan, list[ModuleSharder[nn.Module]]]:
    """The planner's plan, the same on all ranks, and the sharders that carry it out."""
    sharders = get_sharders()
    planner = EmbeddingShardingPlanner(
        batch_size=batch_size,
        constraints=parameter_constraints(model, _wishes(collection, group.size()), batch_size=batch_size),
        storage_reservation=CompressedStorageReservation(),
    )
    return planner.collective_plan(model, sharders, group), sharders


def _wishes(collection: CompressedEmbeddingBagCollection, world_size: int) -> dict[str, ParameterConstraints]:
    """By logical table: those with too few rows to give every rank some are not to be cut by rows."""
    wishes = {}
    for table in collection.lowered_tables:
        num_rows = min(column.num_rows for column in table.row_map.columns)
        if -(-num_rows // world_size) * (world_size - 1) >= num_rows > 0 and world_size > 1:
            pooling_factors = [1.0] * len(table.config.feature_names)
            wishes[table.name] = ParameterConstraints(sharding_types=NOT_BY_ROW, pooling_factors=pooling_factors)
    return wishes


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a line of the plan says of physical tables, the same for all that share it."""

    size: str
    sharding_type: str
    kernel: str
    ranks: str


def plan_table(plan: ShardingPlan, collection: CompressedEmbeddingBagCollection) -> str:
    """A line for each logical table, or for each part of its physical ones that is placed alike; decode tables last."""
    by_name: dict[str, ParameterSharding] = {}
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        by_name.update(module)
    lines = []
    for table in collection.lowered_tables:
        places: dict[_Place, list[str]] = {}
        for name, column in zip(table.physical_names, table.row_map.columns, strict=True):
            place = _place(by_name[name], f"{column.num_rows} x {column.dim}")
            places.setdefault(place, []).append(name)
        for place, names in places.items():
            lines.append([table.name, _listed(names), place.size, place.sharding_type, place.kernel, place.ranks])
    lines += [[table.name, "", "", "replicated", "dense", "all"] for table in collection.decoded_tables]
    return text_table(["table", "physical tables", "rows x dims", "sharding type", "kernel", "ranks"], lines)


def _place(sharding: ParameterSharding, size: str) -> _Place:
    ranks = ", ".join(map(str, sharding.ranks or [])) or "all"
    return _Place(size, sharding.sharding_type, sharding.compute_kernel, ranks)


def _listed(names: list[str]) -> str:
    """`t:0 .. t:7` where they are consecutive columns."""
    numbers = [name.rpartition(":")[2] for name in names]
    if len(names) > 2 and all(number.isdigit() for number in numbers):
        first = int(numbers[0])
        if [int(number) for number in numbers] == list(range(first, first + len(names))):
            return f"{names[0]} .. {names[-1]}"
    return ", ".join(names)
