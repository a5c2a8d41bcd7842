"""Growing a table on all ranks at once."""

from collections.abc import Sequence

import torch.distributed as dist
from torchrec.distributed.types import ShardingEnv

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.build import broadcast
from cce_torchrec.growth import check_growth, grow_table
from cce_torchrec.lowering import Table


def grow_on_all_ranks(tables: Sequence[Table], name: str, num_embeddings: int, env: ShardingEnv) -> None:
    """Take in ids; collective. What is stored of the new ones is rank 0's, in case ranks have different seeds.

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
        raise ValueError(
            f"Table {name!r} has assignment_placement='sharded', so it cannot grow while it is sharded: save a checkpoint, "
            "load it into an unsharded collection, grow that, and shard it."
        )
    grow_table(table, num_embeddings)
    broadcast(table.id_map.buffers(), env)
