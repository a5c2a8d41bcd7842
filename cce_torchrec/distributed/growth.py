"""Growing a table on all ranks at once; where its assignments are sharded by id, blocks of ids move."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardingEnv

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.build import broadcast
from cce_torchrec.distributed.id_sharding import block_of_ids
from cce_torchrec.growth import check_growth, grow_table, set_size
from cce_torchrec.lowering import Table
from cce_torchrec.methods.assignments import AssignedRowMap


def grow_on_all_ranks(tables: Sequence[Table], name: str, num_embeddings: int, env: ShardingEnv) -> None:
    """Take in ids; collective. What replicas store of the new ones is rank 0's, in case ranks have different seeds.

    Raises:
        ValueError: on every rank, with nothing changed, where it cannot be done, or ranks differ in what they ask for.
    """
    asked: list[tuple[str, int] | None] = [None] * env.world_size
    dist.all_gather_object(asked, (name, num_embeddings), group=env.process_group)
    if len(set(asked)) > 1:
        raise ValueError(
            f"Ranks would grow tables differently: {asked}, rank by rank. Call grow with the same arguments."
        )
    table = check_growth(tables, name, num_embeddings)
    if has_sharded_assignments(table.config):
        assert isinstance(table.id_map, AssignedRowMap)
        _move_blocks(table.id_map, num_embeddings, env)
        set_size(table, num_embeddings)
    else:
        grow_table(table, num_embeddings)
        broadcast(table.id_map.buffers(), env)


def _move_blocks(row_map: AssignedRowMap, num_embeddings: int, env: ShardingEnv) -> None:
    """Send the assignments of ids to the ranks that hold them from now on: blocks have become longer."""
    before, after = (
        [block_of_ids(size, rank, env.world_size) for rank in range(env.world_size)]
        for size in (row_map.num_embeddings, num_embeddings)
    )
    width, stored_NW = row_map.encoding.width, row_map.assignments
    row_bytes = width * stored_NW.element_size()
    given = [row_bytes * _overlap(before[env.rank], block) for block in after]
    taken = [row_bytes * _overlap(after[env.rank], block) for block in before]
    known = torch.empty(sum(taken), dtype=torch.uint8, device=stored_NW.device)
    dist.all_to_all_single(known, stored_NW.view(torch.uint8).flatten(), taken, given, group=env.process_group)
    first_id, end = after[env.rank]
    row_map.hold(known.view(stored_NW.dtype).view(-1, width), first_id, end, num_embeddings)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many ids two blocks have in common."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
