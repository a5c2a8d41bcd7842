"""Small collections, batches and plans for the tests that shard something.

Plans are written shard by shard rather than by TorchRec's helpers, which want wide tables for some types.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagCollectionSharder,
    CompressedEmbeddingBagConfig,
)
from cce_torchrec.methods import CCE, CE, PQ, QR, Bloom, FullTable, HashingTrick, ResidualCCE

DIM = 16
LEARNING_RATE = 0.1
EPS = 1e-8
CPU = torch.device("cpu")
ROWWISE_ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LEARNING_RATE, "eps": EPS}

# Ids that fit every table of a feature; None: the tables hash, and any int64 is an id.
NUM_IDS: dict[str, int | None] = {
    **{"f": 57, "g": 101, "h": 53, "i": None, "j": 50, "k": None, "l": 23, "m": None, "n": 47, "o": 37, "p": 43},
    "unused": 10,
}


def mixed_tables(sign: bool = False) -> list[EmbeddingBagConfig]:
    """Every row method and a plain table; sizes that nothing divides, a shared feature, MEAN and SUM; at will a sign hash.

    No codebook has so few rows that one of 4 ranks would hold none of them: FBGEMM's CPU kernels take an empty shard and the
    next one for the same table, and train that wrongly where their dims differ, in a plain collection too.
    """

    def table(name: str, size: int, features: list[str], method: Any, **more: Any) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=DIM, feature_names=features, method=method, **more
        )

    mean = {"pooling": PoolingType.MEAN}
    return [
        table("cce", 101, ["f", "g"], CCE(num_rows=5, num_columns=2, num_helper_rows=6)),
        table("qr_add", 53, ["h"], QR(num_remainders=8), **mean),
        EmbeddingBagConfig(name="plain", num_embeddings=57, embedding_dim=DIM, feature_names=["f"]),
        table("ce", 1000, ["i"], CE(num_rows=7, num_columns=2)),
        table("qr_concat", 50, ["j"], QR(num_remainders=8, operation="concat")),
        table("hashed", 1000, ["k", "g"], HashingTrick(num_rows=11, sign=sign), **mean),
        table("blocks", 43, ["p"], HashingTrick(num_rows=11, assignments="blocks"), **mean),
        table("full", 23, ["l"], FullTable()),
        table("bloom", 1000, ["m"], Bloom(num_rows=11, num_hashes=3), **mean),
        table("residual", 47, ["n"], ResidualCCE(num_rows=4, num_levels=3, num_columns=2, num_helper_rows=5)),
        table("pq", 37, ["o"], PQ(num_rows=7, num_columns=2)),
    ]


def batch(
    generator: torch.Generator, batch_size: int, *, is_weighted: bool = False, longest: int = 3
) -> KeyedJaggedTensor:
    """A random batch with empty bags, its features in an order of their own and one that no table wants."""
    features = sorted(NUM_IDS, reverse=True)
    lengths = torch.randint(0, longest + 1, (len(features) * batch_size,), generator=generator)
    counts = lengths.view(len(features), -1).sum(1).tolist()
    bounds = [(-(2**62), 2**62) if NUM_IDS[feature] is None else (0, NUM_IDS[feature]) for feature in features]
    ids = [torch.randint(*bound, (n,), generator=generator) for bound, n in zip(bounds, counts, strict=True)]
    weights = torch.rand(sum(counts), generator=generator) + 0.5 if is_weighted else None
    return KeyedJaggedTensor(keys=features, values=torch.cat(ids), lengths=lengths, weights=weights)


class Model(nn.Module):
    """A collection with a place in a model, so that names have a prefix."""

    def __init__(
        self, tables: Sequence[EmbeddingBagConfig] | None = None, device: str = "cpu", is_weighted: bool = False
    ) -> None:
        super().__init__()
        tables = mixed_tables() if tables is None else tables
        self.collection = CompressedEmbeddingBagCollection(tables, is_weighted=is_weighted, device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.collection(features)


@dataclass(frozen=True)
class Placement:
    """How one physical table is sharded.

    Args:
        sharding_type: TorchRec's name of it.
        rows: ranks that its rows are split over, in blocks of equal size but for the last.
        column_shards: how many times its columns are split; each split takes the next ``rows`` of ``ranks``.
    """

    sharding_type: str
    ranks: tuple[int, ...] = ()
    column_shards: int = 1
    kernel: str = "fused"

    def sharding(self, num_rows: int, dim: int, world_size: int, local_size: int) -> ParameterSharding:
        """The entry of a plan."""
        if self.sharding_type == "data_parallel":
            kernel = self.kernel if self.ranks else "dense"
            return ParameterSharding(self.sharding_type, compute_kernel=kernel, ranks=list(range(world_size)))
        assert dim % self.column_shards == 0
        assert len(self.ranks) % self.column_shards == 0
        row_shards, width = len(self.ranks) // self.column_shards, dim // self.column_shards
        block = -(-num_rows // row_shards)
        shards = []
        for index, rank in enumerate(self.ranks):
            start = min(index % row_shards * block, num_rows)
            sizes = [min(block, num_rows - start), width]
            offsets = [start, index // row_shards * width]
            shards.append(
                ShardMetadata(shard_sizes=sizes, shard_offsets=offsets, placement=placement("cpu", rank, local_size))
            )
        return ParameterSharding(
            self.sharding_type, self.kernel, ranks=list(self.ranks), sharding_spec=EnumerableShardingSpec(shards)
        )


DATA_PARALLEL = Placement("data_parallel")


def table_wise(rank: int) -> Placement:
    return Placement("table_wise", (rank,))


def row_wise(world_size: int) -> Placement:
    return Placement("row_wise", tuple(range(world_size)))


def column_wise(*ranks: int) -> Placement:
    return Placement("column_wise", ranks, len(ranks))


def table_row_wise(*ranks: int) -> Placement:
    return Placement("table_row_wise", ranks)


def table_column_wise(*ranks: int) -> Placement:
    return Placement("table_column_wise", ranks, len(ranks))


def grid(*ranks: int, column_shards: int = 2) -> Placement:
    return Placement("grid_shard", ranks, column_shards)


def everything(place: Callable[[int], Placement]) -> Callable[[list[str]], dict[str, Placement]]:
    return lambda names: {name: place(index) for index, name in enumerate(names)}


def mixed_on_2(names: list[str]) -> dict[str, Placement]:
    """Four types at once; the two columns of one table differ in type."""
    places = [row_wise(2), table_wise(1), column_wise(0, 1), DATA_PARALLEL, table_wise(0)]
    return {name: places[index % len(places)] for index, name in enumerate(names)}


ON_2 = {
    "data_parallel": everything(lambda i: DATA_PARALLEL),
    "table_wise": everything(lambda i: table_wise(i % 2)),
    "table_wise_one_rank": everything(lambda i: table_wise(1)),
    "column_wise": everything(lambda i: column_wise(0, 1) if i % 2 else column_wise(1, 1)),
    "row_wise": everything(lambda i: row_wise(2)),
    "table_column_wise": everything(lambda i: table_column_wise(i % 2, 0)),
    "table_row_wise": everything(lambda i: table_row_wise(0, 1)),
    "mixed": mixed_on_2,
}


def mixed_on_4(names: list[str]) -> dict[str, Placement]:
    """All seven types at once, on two hosts."""
    places = [
        row_wise(4),
        table_wise(3),
        column_wise(2, 0),
        DATA_PARALLEL,
        table_row_wise(2, 3),
        table_column_wise(0, 1),
        grid(0, 1, 2, 3),
    ]
    return {name: places[index % len(places)] for index, name in enumerate(names)}


# On 4 ranks of two hosts. A grid is two column shards, each split by rows over a host.
ON_4 = {
    "data_parallel": everything(lambda i: DATA_PARALLEL),
    "table_wise": everything(lambda i: table_wise(3 - i % 3)),
    "column_wise": everything(lambda i: column_wise(3, 1) if i % 2 else column_wise(0, 2)),
    "table_row_wise": everything(lambda i: table_row_wise(2, 3) if i % 2 else table_row_wise(0, 1)),
    "table_column_wise": everything(lambda i: table_column_wise(2, 3) if i % 2 else table_column_wise(1, 0)),
    "grid_shard": everything(lambda i: grid(0, 1, 2, 3)),
    "row_wise": everything(lambda i: row_wise(4)),
    "mixed": mixed_on_4,
}


def make_plan(
    sharder: ModuleSharder, collection: nn.Module, placements: dict[str, Placement], local_size: int
) -> EmbeddingModuleShardingPlan:
    """A plan for one collection."""
    parameters = sharder.shardable_parameters(collection)
    assert set(parameters) == set(placements), set(parameters) ^ set(placements)
    shape = {name: parameter.shape for name, parameter in parameters.items()}
    world_size = dist.get_world_size()
    return EmbeddingModuleShardingPlan(
        {name: placements[name].sharding(*shape[name], world_size, local_size) for name in placements}
    )


def shard(
    model: nn.Module,
    placements: dict[str, Placement],
    *,
    fused_params: dict[str, Any] | None = None,
    local_size: int | None = None,
    paths: Sequence[str] = ("collection",),
) -> DistributedModelParallel:
    """Shard the collections at some paths of a model, which have the same tables, by hand."""
    sharder = CompressedEmbeddingBagCollectionSharder(fused_params=fused_params)
    local_size = dist.get_world_size() if local_size is None else local_size
    plan = {path: make_plan(sharder, model.get_submodule(path), placements, local_size) for path in paths}
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=CPU,
        plan=ShardingPlan(plan=plan),
        sharders=[sharder],
    )


def physical_tables(collection: CompressedEmbeddingBagCollection) -> list[str]:
    """Names of what the plan must place."""
    return [name for table in collection.lowered_tables for name in table.physical_names]
