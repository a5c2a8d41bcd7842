"""A training script that knows TorchRec only: a DLRM on random clicks that a hidden table of numbers explains.

Built as scripts for TorchRec's DLRM usually are: default sharders imported by name, a collection on "meta", optimizers in
backward, a planner of its own, ``DistributedModelParallel`` without sharders, a pipeline, and epochs of a ``DataLoader`` each
followed by a validation.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.data import DataLoader, IterableDataset
from torchrec import EmbeddingBagCollection
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

SIZES = {"item": 4000, "user": 3000, "day": 7}


@dataclass
class Clicks(Pipelineable):
    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Clicks":
        moved = (self.dense_features, self.sparse_features, self.labels)
        return Clicks(*(part.to(device=device, non_blocking=non_blocking) for part in moved))

    def record_stream(self, stream: torch.Stream) -> None:
        self.sparse_features.record_stream(stream)

    def pin_memory(self) -> "Clicks":
        return Clicks(self.dense_features.pin_memory(), self.sparse_features.pin_memory(), self.labels.pin_memory())


class RandomClicks(IterableDataset[Clicks]):
    def __init__(self, steps: int, batch_size: int, seed: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        hidden = torch.Generator().manual_seed(1)
        # Ids of the same residue modulo 10 behave alike, which is what clustering can find out.
        self.tastes = [torch.randn(10, generator=hidden)[torch.arange(size) % 10] for size in SIZES.values()]
        self.drawn = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Clicks]:
        for _ in range(self.steps):
            ids = [torch.randint(size, (self.batch_size,), generator=self.drawn) for size in SIZES.values()]
            score = sum(taste[of_table] for taste, of_table in zip(self.tastes, ids, strict=True))
            assert isinstance(score, torch.Tensor)
            lengths = torch.ones(len(SIZES) * self.batch_size, dtype=torch.int32)
            sparse = KeyedJaggedTensor(keys=list(SIZES), values=torch.cat(ids), lengths=lengths)
            yield Clicks(torch.rand(self.batch_size, 4, generator=self.drawn), sparse, (score > 0).float())


def run_epoch(pipeline: TrainPipelineSparseDist[Clicks, Any], loader: "DataLoader[Clicks]") -> list[float]:
    iterator, losses = iter(loader), []
    for _ in itertools.count():
        try:
            loss, *_ = pipeline.progress(iterator)
        except StopIteration:
            return losses
        losses.append(loss.item())
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="batches an epoch")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=0.3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    dist.init_process_group(backend="gloo")
    torch.manual_seed(0)

    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=16, num_embeddings=size, feature_names=[name])
        for name, size in SIZES.items()
    ]
    model = DLRMTrain(
        DLRM(
            embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            dense_in_features=4,
            dense_arch_layer_sizes=[16, 16],
            over_arch_layer_sizes=[32, 1],
            dense_device=device,
        )
    )
    apply_optimizer_in_backward(torch.optim.Adagrad, model.model.sparse_arch.parameters(), {"lr": args.learning_rate})
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            local_world_size=get_local_size(), world_size=dist.get_world_size(), compute_device=device.type
        ),
        batch_size=args.batch_size,
        storage_reservation=HeuristicalStorageReservation(percentage=0.05),
    )
    plan = planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(module=model, device=device, plan=plan)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())), lambda p: torch.optim.Adagrad(p, lr=0.05)
    )
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense])

    pipeline = TrainPipelineSparseDist(sharded, optimizer, device, execute_all_batches=True)
    train_loader = DataLoader(RandomClicks(args.steps, args.batch_size, seed=100 + rank), batch_size=None)
    val_loader = DataLoader(RandomClicks(2, args.batch_size, seed=200 + rank), batch_size=None)
    losses = []
    for _ in range(args.epochs):
        sharded.train()
        losses += run_epoch(pipeline, train_loader)
        sharded.eval()
        with torch.no_grad():
            run_epoch(pipeline, val_loader)
    collection = sharded.module.model.sparse_arch.embedding_bag_collection
    result = {
        "losses": losses,
        "collection": type(collection).__name__,
        "placements": {n: p.sharding_type for of_module in plan.plan.values() for n, p in of_module.items()},
        "state": {name: list(value.size()) for name, value in sharded.state_dict().items() if "sparse_arch" in name},
        "versions": {n: int(v) for n, v in sharded.state_dict().items() if n.endswith(".version")},
    }
    (args.out / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
