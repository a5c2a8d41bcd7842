"""What the planner is told, and how its plan is shown."""

import pytest
import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import FullTable, MethodConfig
from dlrm_example.plan import _wishes, plan_table


def collection(name: str, num_embeddings: int, method: MethodConfig) -> CompressedEmbeddingBagCollection:
    table = CompressedEmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=16, feature_names=["f"], method=method
    )
    return CompressedEmbeddingBagCollection(tables=[table], device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_tables_are_not_cut_by_rows_where_a_rank_would_get_none(world_size: int) -> None:
    """As many rows as TorchRec itself would give each rank."""
    for num_rows in range(1, 40):
        sizes, _ = calculate_shard_sizes_and_offsets(torch.empty(num_rows, 16), world_size, world_size, "row_wise")
        wishes = _wishes(collection("t", num_rows, FullTable()), world_size)
        assert ("t" in wishes) == any(rows == 0 for rows, _ in sizes), (num_rows, sizes)
        assert "t" not in wishes or "row_wise" not in (wishes["t"].sharding_types or [])


def place(sharding_type: str, *ranks: int) -> ParameterSharding:
    return ParameterSharding(sharding_type, EmbeddingComputeKernel.FUSED.value, list(ranks))


def test_plan_by_logical_table() -> None:
    """Columns that are placed alike share a line."""
    tables = collection("t", 100, CCE(num_rows=6, num_columns=4))
    places = {"t:0": place("row_wise", 0, 1), "t:1": place("table_wise", 1)}
    places |= {"t:2": place("row_wise", 0, 1), "t:3": place("row_wise", 0, 1)}
    plan = ShardingPlan({"tables": EmbeddingModuleShardingPlan(places)})
    lines = [line.split() for line in plan_table(plan, tables).splitlines()[2:]]
    size = ["12", "x", "4"]
    assert lines == [
        ["t", "t:0,", "t:2,", "t:3", *size, "row_wise", "fused", "0,", "1"],
        ["t", "t:1", *size, "table_wise", "fused", "1"],
    ]
    alike = ShardingPlan({"tables": EmbeddingModuleShardingPlan({name: place("row_wise", 0, 1) for name in places})})
    assert "t:0 .. t:3" in plan_table(alike, tables)
