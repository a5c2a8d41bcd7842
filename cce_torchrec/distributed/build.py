"""Building a sharded collection: TorchRec shards the codebooks, then they and the assignments take over their state."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.id_sharding import check_replicated
from cce_torchrec.distributed.replicated import requested_optimizers, train_replicated
from cce_torchrec.distributed.uneven import allow_uneven_batches
from cce_torchrec.hashing import derive_seed
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.native.rows_lookup import use_native_lookups


def shard_codebooks(
    module: CompressedEmbeddingBagCollection,
    tables: list[LoweredTable],
    params: dict[str, ParameterSharding],
    ebc_sharder: EmbeddingBagCollectionSharder,
    env: ShardingEnv,
    device: torch.device,
    module_fqn: str | None,
) -> ShardedEmbeddingBagCollection:
    """TorchRec shards the codebooks; replicated ones train as they were asked to."""
    check_replicated(tables, params)
    collection = module._embedding_bag_collection
    requests = requested_optimizers(collection)
    sharded = ebc_sharder.shard(collection, params, env, device, module_fqn)
    train_replicated(sharded, requests)
    allow_uneven_batches(sharded._output_dists, env.process_group)
    for lookup in sharded._lookups:
        use_native_lookups(lookup)
    return sharded


@torch.no_grad()
def take_over_state(
    module: CompressedEmbeddingBagCollection,
    inner: ShardedEmbeddingBagCollection,
    row_maps: nn.ModuleDict,
    tables: list[LoweredTable],
    env: ShardingEnv,
) -> None:
    """Copy weights and assignments of a real module; initialise those of a meta one. Replicas are rank 0's."""
    if module.device.type == "meta":
        for config in inner._embedding_bag_configs:
            _init_shard(inner, config, env)
    else:
        inner.load_state_dict(module._embedding_bag_collection.state_dict())
        row_maps.load_state_dict(module._row_maps.state_dict())
    replicated = [
        inner.embedding_bags[name].weight
        for name, sharding in inner.module_sharding_plan.items()
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    ]
    for table in tables:
        buffers = dict(table.row_map.named_buffers())
        if has_sharded_assignments(table.config):
            del buffers["assignments"]
        replicated.extend(buffers.values())
    broadcast(replicated, env)


def broadcast(tensors: Iterable[Tensor], env: ShardingEnv) -> None:
    """Give every rank what rank 0 has: ranks may have been built from different seeds."""
    for tensor in tensors:
        if tensor.numel():
            # As bytes where the backend may not know the type: gloo has no int16.
            data = tensor.data.view(torch.uint8) if tensor.dtype == torch.int16 else tensor.data
            dist.broadcast(data, dist.get_global_rank(env.process_group, 0), env.process_group)


def _init_shard(inner: ShardedEmbeddingBagCollection, config: EmbeddingBagConfig, env: ShardingEnv) -> None:
    """Draw the local part of a codebook from a stream of its own: ranks with one seed must not draw equal shards."""
    weight = inner.embedding_bags[config.name].weight
    if not weight.numel():
        return
    assert config.init_fn is not None
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(torch.initial_seed(), config.name, env.rank))
        config.init_fn(weight)
