"""The planner's plan as it is printed: by logical table."""

import logging

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Topology

from cce_torchrec import (
    CCE,
    DHE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressedEmbeddingStats,
    CompressedPerfEstimator,
    CompressedStorageEstimator,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.planner.stats import plan_table

pytestmark = pytest.mark.filterwarnings("ignore:.*The topology was constructed directly:UserWarning")
META = torch.device("meta")


class Model(nn.Module):
    """Compressed tables, one of them by a network, and a plain one."""

    def __init__(self) -> None:
        super().__init__()

        def config(name: str, method: CCE | DHE) -> CompressedEmbeddingBagConfig:
            return CompressedEmbeddingBagConfig(
                name=name, num_embeddings=1000, embedding_dim=16, feature_names=[f"f_{name}"], method=method
            )

        tables = [
            config("item", CCE(num_rows=24, num_columns=4)),
            config("user", CCE(num_rows=8, num_columns=1)),
            config("net", DHE(num_hashes=4, width=4)),
        ]
        self.compressed = CompressedEmbeddingBagCollection(tables=tables, device=META)
        plain = EmbeddingBagConfig(name="plain", num_embeddings=50, embedding_dim=16, feature_names=["p"])
        self.plain = EmbeddingBagCollection(tables=[plain], device=META)


def planned(model: nn.Module) -> CompressedEmbeddingStats:
    topology = Topology(world_size=2, compute_device="cpu")
    constraints = parameter_constraints(
        model,
        {
            "item": ParameterConstraints(sharding_types=["row_wise"]),
            "user": ParameterConstraints(sharding_types=["data_parallel"]),
            "plain": ParameterConstraints(sharding_types=["table_wise"]),
        },
    )
    constraints["item:1"].sharding_types = ["data_parallel"]  # one column is somewhere else
    estimators = [
        CompressedPerfEstimator(topology, constraints),
        CompressedStorageEstimator(topology, constraints),
    ]
    enumerator = EmbeddingEnumerator(topology, batch_size=64, constraints=constraints, estimator=estimators)
    stats = CompressedEmbeddingStats()
    planner = EmbeddingShardingPlanner(
        topology=topology, enumerator=enumerator, constraints=constraints, batch_size=64, stats=stats
    )
    planner.plan(model, get_sharders())
    return stats


def test_a_line_a_logical_table_and_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stats = planned(Model())
    head, *lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in stats.table.splitlines()]
    assert head == ["table", "method", "columns", "rows x dims", "sharding type", "kernel", "ranks", "bytes", "perf ms"]
    found = {(line[0], *line[1:7]) for line in lines}
    assert ("item", "cce", "0, 2-3", "48 x 4", "row_wise", "fused", "0-1") in found
    assert ("item", "cce", "1", "48 x 4", "data_parallel", "dense", "0-1") in found
    assert ("user", "cce", "0", "16 x 16", "data_parallel", "dense", "0-1") in found
    assert any(line[:2] == ["net", "dhe"] and line[2:5] == ["replicated", "dense", "all"] for line in lines)
    assert any(line[0] == "plain" and line[1:3] == ["50 x 16", "table_wise"] for line in lines)
    assert len(lines) == 5
    assert "item:0" not in stats.table
    assert "Planner Statistics" in caplog.text, "TorchRec's own are still there"
    assert all(line in caplog.text for line in stats.table.splitlines())


def test_bytes_are_the_planners() -> None:
    """Of a replica on each rank: weight and gradient; and what TorchRec counts for inputs and outputs."""
    line = next(line for line in planned(Model()).table.splitlines() if line.startswith("user"))
    bytes_ = int(line.split()[-2].replace(",", ""))
    assert bytes_ >= 2 * 2 * 16 * 16 * 4
    assert float(line.split()[-1]) > 0


def test_nothing_to_shard() -> None:
    assert plan_table([]).startswith("Nothing is sharded")
