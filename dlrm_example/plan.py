"""Where the tables go: what TorchRec's planner is told."""

import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingStats,
    CompressedStorageReservation,
    get_sharders,
    parameter_constraints,
)

NOT_BY_ROW = [ShardingType.DATA_PARALLEL.value, ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]


def make_plan(
    model: nn.Module,
    collection: CompressedEmbeddingBagCollection,
    batch_size: int,
    group: dist.ProcessGroup,
    *,
    show: bool,
) -> tuple[ShardingPlan, list[ModuleSharder[nn.Module]]]:
    """The planner's plan, the same on all ranks and logged on the first if asked for, and the sharders that carry it out."""
    sharders = get_sharders()
    planner = EmbeddingShardingPlanner(
        batch_size=batch_size,
        constraints=parameter_constraints(model, _wishes(collection, group.size()), batch_size=batch_size),
        storage_reservation=CompressedStorageReservation(),
        stats=CompressedEmbeddingStats() if show else NoopEmbeddingStats(),
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
