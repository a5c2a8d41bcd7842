"""The collections that the step benchmarks train: sizes, ways to shard and compress them, the bytes that they must move."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import (
    CCE,
    METHODS,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    get_sharders,
)
from cce_torchrec.methods import MethodConfig
from cce_torchrec.methods.assignments import AssignmentStorage
from cce_torchrec.methods.encoding import smallest_int_dtype

COMPRESSION = 8  # times fewer parameters, of methods that are asked for by name


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    ranks: int
    batch_size: int
    num_tables: int
    dim: int
    num_embeddings: int
    num_rows: int
    num_columns: int
    bag: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Way:
    """One way to train the tables, and the plain collection it is compared with."""

    compressed: bool
    sharding_type: str
    base: str | None = None
    by_id: bool = False
    storage: AssignmentStorage = field(default_factory=AssignmentStorage)  # of CCE
    method: str | None = None  # of METHODS, at a budget; CCE of the given sizes where None


def method_of(way: Way, sizes: Sizes) -> MethodConfig | None:
    """How the tables are compressed."""
    if not way.compressed:
        return None
    if way.method is None:
        return CCE(num_rows=sizes.num_rows, num_columns=sizes.num_columns, **vars(way.storage))
    V, D = sizes.num_embeddings, sizes.dim
    return METHODS[way.method].from_budget(V, D, V * D if way.method == "full" else V * D // COMPRESSION)


def memory_bytes(way: Way, sizes: Sizes) -> dict[str, float]:
    """What one rank's ``lookup`` and ``step`` must at least read and write, with nothing in a cache and nothing done twice.

    A lookup reads ids, assignments and rows (at most every parameter once) and writes pooled vectors. A step also reads
    their gradients, reads and writes the rows, and the optimizer's number of each.
    """
    F, B, D, n = sizes.num_tables, sizes.batch_size, sizes.dim, sizes.bag
    method = method_of(way, sizes)
    params = sizes.num_embeddings * D if method is None else method.num_params(sizes.num_embeddings, D)
    is_cce = way.compressed and way.method in (None, "cce")
    assignments = 0
    if isinstance(method, CCE):
        assignments = method.num_columns * torch.iinfo(smallest_int_dtype(method.num_rows)).bits // 8
    rows = 4 * min(F * B * n * D * (2 if is_cce else 1), F * params)
    pooled = 4 * F * B * D
    lookup = F * B * n * (8 + assignments) + rows + pooled
    return {"lookup": lookup, "step": lookup + pooled + 2 * rows + 2 * rows / D}


class Model(nn.Module):
    """A collection with a place in a model."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors."""
        return self.collection(features)


def build(way: Way, sizes: Sizes) -> DistributedModelParallel:
    """The sharded model of one way."""
    torch.manual_seed(0)
    meta = torch.device("meta")
    common = [
        {
            "name": f"t{t}",
            "num_embeddings": sizes.num_embeddings,
            "embedding_dim": sizes.dim,
            "feature_names": [f"f{t}"],
        }
        for t in range(sizes.num_tables)
    ]
    collection: CompressedEmbeddingBagCollection | EmbeddingBagCollection
    method = method_of(way, sizes)
    if method is not None:
        placement = "sharded" if way.by_id else "replicated"
        configs = [CompressedEmbeddingBagConfig(**c, method=method, assignment_placement=placement) for c in common]
        collection = CompressedEmbeddingBagCollection(configs, device=meta)
    else:
        collection = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**c) for c in common], device=meta)
    parameters = collection.codebook_parameters() if method is not None else collection.parameters()
    apply_optimizer_in_backward(RowWiseAdagrad, parameters, {"lr": 0.01})
    sharder = next(s for s in get_sharders() if s.module_type is type(collection))

    def place(physical_table: str) -> Any:
        if way.sharding_type == "data_parallel":
            return data_parallel()
        if way.sharding_type == "row_wise":
            return row_wise(compute_kernel="fused")
        if way.sharding_type == "column_wise":
            return column_wise(ranks=list(range(sizes.ranks)), compute_kernel="fused")
        owner = int(physical_table.split(":")[0].removeprefix("t")) % sizes.ranks
        return table_wise(rank=owner, compute_kernel="fused")

    plan = construct_module_sharding_plan(
        collection,
        {name: place(name) for name in sharder.shardable_parameters(collection)},
        sharder,
        local_size=sizes.ranks,
        world_size=sizes.ranks,
        device_type="cpu",
    )
    return DistributedModelParallel(
        Model(collection),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"collection": plan}),
        sharders=[sharder],
    )
