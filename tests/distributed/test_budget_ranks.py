"""A plan for two devices: what each rank really holds, to the byte, and what a re-clustering takes there."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import Topology
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    ReclusterConfig,
    compress,
    get_sharders,
    parameter_constraints,
    plan_compression,
    recluster,
)
from tests.distributed.harness import RankPool

CPU = torch.device("cpu")
TABLES = [
    EmbeddingBagConfig(name="t_big", num_embeddings=400_000, embedding_dim=16, feature_names=["big"]),
    EmbeddingBagConfig(name="t_mid", num_embeddings=60_001, embedding_dim=16, feature_names=["mid"]),
    EmbeddingBagConfig(name="t_small", num_embeddings=3, embedding_dim=16, feature_names=["small"]),
]


def size(value: Any) -> int:
    """Bytes of this rank's part."""
    parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    return sum(part.numel() * part.element_size() for part in parts)


def held_bytes(dmp: DistributedModelParallel) -> dict[str, dict[str, int]]:
    """By logical table: bytes of this rank's codebooks, optimizer state, and all else."""
    found: dict[str, dict[str, int]] = {
        table.name: {"codebooks": 0, "optimizer": 0, "assignments": 0} for table in TABLES
    }
    for key, value in dmp.state_dict().items():
        parts = key.split(".")
        if "embedding_bags" in parts:
            found[parts[parts.index("embedding_bags") + 1].partition(":")[0]]["codebooks"] += size(value)
        elif "_row_maps" in parts:
            found[parts[parts.index("_row_maps") + 1]]["assignments"] += size(value)
    for key, state in dmp.fused_optimizer.state_dict()["state"].items():
        parts = key.split(".")
        name = parts[parts.index("embedding_bags") + 1].partition(":")[0]
        found[name]["optimizer"] += sum(
            size(value) for value in state.values() if isinstance(value, Tensor | ShardedTensor)
        )
    return found


def check_bytes(rank: int, world_size: int) -> None:
    statistics = {"t_big": 1, "t_mid": 30, "t_small": 1}
    config = ReclusterConfig(decode_batch_size=4096)
    plan = plan_compression(
        TABLES,
        budget_bytes=12_000_000,
        world_size=world_size,
        statistics=statistics,
        recluster=config,
        device_type="cpu",
    )
    placements = {t.table: (t.method.key, t.placement) for t in plan.tables}
    assert placements == {
        "t_big": ("cce", "replicated"),
        "t_mid": ("full", "row_wise"),
        "t_small": ("full", "replicated"),
    }
    model = compress(torch.nn.Sequential(EmbeddingBagCollection(tables=TABLES)), plan)
    collection = model[0]
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    apply_optimizer_in_backward(RowWiseAdagrad, collection.codebook_parameters(), {"lr": 0.1})
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"),
        constraints=parameter_constraints(model, plan.constraints()),
    )
    group = torch.distributed.group.WORLD
    sharding = planner.collective_plan(model, get_sharders(), group)
    dmp = DistributedModelParallel(model, device=CPU, plan=sharding, sharders=get_sharders())
    ids = KeyedJaggedTensor(["big", "mid", "small"], torch.arange(3) % 3, lengths=torch.ones(3, dtype=torch.int32))
    dmp(ids).values().sum().backward()
    held = held_bytes(dmp)
    most = {name: dict(of_table) for name, of_table in held.items()}
    for of_table in most.values():
        for key, value in of_table.items():
            total = torch.tensor(value)
            torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX)
            of_table[key] = int(total)
    for table in plan.tables:
        counted = {name: getattr(table.bytes, name) for name in ("codebooks", "optimizer", "assignments")}
        assert counted == most[table.table], table.table
    tracker = MemTracker()
    tracker.track_external(dmp)
    with tracker:
        before = tracker.get_tracker_snapshot("current")[CPU]["Total"]
        recluster(dmp, seed=0, config=config)
    taken = tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before
    counted_workspace = sum(table.bytes.workspace for table in plan.tables) + plan.transient_bytes
    assert taken <= counted_workspace <= 3 * taken + (4 << 20), (taken, counted_workspace)


def test_bytes_on_two_ranks(ranks2: RankPool) -> None:
    ranks2.run(check_bytes)
