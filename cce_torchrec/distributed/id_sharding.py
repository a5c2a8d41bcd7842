"""Assignments sharded by id: each rank holds those of its block of ids, and a replica of the codebooks (see fetch.py)."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods.cce import CCERowMap


def block_of_ids(num_embeddings: int, rank: int, world_size: int) -> tuple[int, int]:
    """The ids whose assignments a rank holds: ceil(V / ranks) each, the last ranks fewer or none."""
    size = -(-num_embeddings // world_size)
    start = min(rank * size, num_embeddings)
    return start, min(start + size, num_embeddings)


def keep_local_blocks(tables: list[LoweredTable], env: ShardingEnv, device: torch.device) -> None:
    """Drop the assignments of other ranks' ids."""
    for table in tables:
        if has_sharded_assignments(table.config):
            assert isinstance(table.row_map, CCERowMap)
            table.row_map.keep_block(*block_of_ids(table.config.num_embeddings, env.rank, env.world_size), device)
            table.row_map.register_state_dict_post_hook(partial(_to_sharded_tensor, env))
            table.row_map.register_load_state_dict_pre_hook(_to_local_block)


def _to_sharded_tensor(env: ShardingEnv, row_map: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """In checkpoints the blocks of all ranks are one sharded tensor [V, c], which loads into any placement."""
    assert isinstance(row_map, CCERowMap)
    block, columns = row_map.assignments, row_map.assignments.shape[1]
    shards = []
    for rank in range(env.world_size):
        start, end = block_of_ids(row_map.num_embeddings, rank, env.world_size)
        if end > start:
            placement = f"rank:{dist.get_global_rank(env.process_group, rank)}/{block.device}"
            shards.append(ShardMetadata([start, 0], [end - start, columns], placement))
    metadata = ShardedTensorMetadata(
        shards, torch.Size([row_map.num_embeddings, columns]), TensorProperties(dtype=block.dtype)
    )
    local = [Shard(block, shards[env.rank])] if len(block) else []
    state[prefix + "assignments"] = ShardedTensor._init_from_local_shards_and_global_metadata(
        local, metadata, process_group=env.process_group
    )


def _to_local_block(row_map: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take this rank's block out of a whole or a sharded tensor."""
    assert isinstance(row_map, CCERowMap)
    value = state.get(prefix + "assignments")
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        state[prefix + "assignments"] = shards[0].tensor if shards else row_map.assignments[:0]
    elif isinstance(value, Tensor) and len(value) == row_map.num_embeddings:
        state[prefix + "assignments"] = value[row_map.first_id : row_map.first_id + len(row_map.assignments)]


def check_replicated(tables: list[LoweredTable], params: dict[str, ParameterSharding]) -> None:
    """Raise a ``ValueError`` where the codebooks of an id-sharded table are not data-parallel."""
    for table in tables:
        for name in table.physical_names if has_sharded_assignments(table.config) else []:
            sharding_type = params[name].sharding_type
            if sharding_type != ShardingType.DATA_PARALLEL.value:
                raise ValueError(
                    f"Table {table.name!r} has assignment_placement='sharded', which needs replicated codebooks, but "
                    f"{name!r} is planned {sharding_type!r}: constrain it to 'data_parallel', as "
                    "cce_torchrec.parameter_constraints does, or replicate its assignments."
                )
