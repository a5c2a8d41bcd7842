"""The planner's storage of compressed tables against what each of two ranks holds after a step, to the byte."""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressedStorageEstimator,
    get_sharders,
    parameter_constraints,
)
from tests.distributed.harness import RankPool
from tests.unit.oracles import make_kjt

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
TABLES = [
    CompressedEmbeddingBagConfig(
        name="t", num_embeddings=500, embedding_dim=32, feature_names=["f"], method=CCE(num_rows=33, num_columns=2)
    ),
    EmbeddingBagConfig(name="u", num_embeddings=101, embedding_dim=16, feature_names=["g"]),
]
KINDS = ["data_parallel", "table_wise", "column_wise", "row_wise"]


def build(kind: str, optimizer: Any) -> tuple[nn.Module, Any, Topology]:
    """A model, its constraints by physical table, and two devices."""
    collection = CompressedEmbeddingBagCollection(tables=TABLES)
    if optimizer is not None:
        apply_optimizer_in_backward(optimizer, collection.codebook_parameters(), {"lr": 0.1})
    model = nn.Sequential(collection)
    wishes = {t.name: ParameterConstraints(sharding_types=[kind], min_partition=8) for t in TABLES}
    return model, parameter_constraints(model, wishes), Topology(world_size=2, compute_device="cpu")


def options(model: nn.Module, sharders: Any, constraints: Any, topology: Topology, kind: Any) -> list[ShardingOption]:
    """Every option of the planner with its storage, by an estimator."""
    estimators = [EmbeddingPerfEstimator(topology, constraints), kind(topology, constraints)]
    enumerator = EmbeddingEnumerator(topology, batch_size=0, constraints=constraints, estimator=estimators)
    return enumerator.enumerate(model, sharders)


def size(value: Any) -> int:
    parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    return sum(part.numel() * part.element_size() for part in parts)


def held(dmp: DistributedModelParallel) -> int:
    """This rank's bytes of codebooks, gradients that stay, and optimizer state."""
    codebooks = {name: value for name, value in dmp.state_dict().items() if "embedding_bags" in name}
    states = dmp.fused_optimizer.state_dict()["state"].values()
    lookups = dmp.module[0]._embedding_bag_collection._lookups  # type: ignore[index, union-attr]
    gradients = [p.grad for lookup in lookups for p in lookup.parameters() if p.grad is not None]
    state = sum(
        size(value) for of_table in states for value in of_table.values() if isinstance(value, Tensor | ShardedTensor)
    )
    return sum(map(size, codebooks.values())) + state + sum(map(size, gradients))


def check_bytes(rank: int, world_size: int, kind: str, in_backward: Any, fused_params: Any) -> None:
    model, constraints, topology = build(kind, in_backward)
    sharders = get_sharders(fused_params)
    kernel = "dense" if kind == "data_parallel" else "fused"
    found = [
        o
        for o in options(model, sharders, constraints, topology, CompressedStorageEstimator)
        if o.compute_kernel == kernel
    ]
    assert {option.sharding_type for option in found} == {kind}
    estimated = sum(shard.storage.ddr for option in found for shard in option.shards)  # type: ignore[union-attr]
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, torch.distributed.group.WORLD)
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    dmp(make_kjt({"f": [[1, 2], [3]], "g": [[4], []]})).values().sum().backward()
    total = torch.tensor(held(dmp))
    torch.distributed.all_reduce(total)
    assert estimated == int(total), (kind, estimated, int(total))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, RowWiseAdagrad, torch.optim.Adagrad])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_in_backward(ranks2: RankPool, kind: str, optimizer: Any) -> None:
    ranks2.run(check_bytes, kind, optimizer, None)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_optimizers_by_fused_params(ranks2: RankPool, kind: str) -> None:
    ranks2.run(check_bytes, kind, None, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})


def test_inputs_and_outputs_stay_torchrecs() -> None:
    """Where TorchRec counts exactly, nothing is changed, whatever the batch size."""
    model, constraints, topology = build("table_wise", torch.optim.SGD)
    both = []
    for kind in (EmbeddingStorageEstimator, CompressedStorageEstimator):
        estimators = [EmbeddingPerfEstimator(topology, constraints), kind(topology, constraints)]
        enumerator = EmbeddingEnumerator(topology, batch_size=64, constraints=constraints, estimator=estimators)
        both.append([shard.storage for o in enumerator.enumerate(model, get_sharders()) for shard in o.shards])
    assert both[0] == both[1]
