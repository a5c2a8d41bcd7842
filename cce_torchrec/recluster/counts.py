"""Which ids get stored assignments where not all ids have them: those that all ranks together have seen most often.

Shapes: V ids, U different ids that were seen, N slots.
"""

import logging

import torch
from torch import Tensor

from cce_torchrec.methods.assignments import AssignedRowMap
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.vocabulary import Block, choose_among_ranks, gather_block
from cce_torchrec.sums_by_id import SumsById

logger = logging.getLogger(__name__)


def choose_ids(
    name: str, row_map: AssignedRowMap, weights_V: Tensor | None, counts: SumsById | None, collectives: Collectives
) -> Tensor | None:
    """The ids of a table that are to have slots, in rising order; ``None`` where all have them. Collective.

    There may be none yet, which is logged.

    Args:
        name: of the table.
        row_map: its.
        weights_V: of all ids, which then decide.
        counts: of its ids on this rank, which decide otherwise; ``None`` only where all have slots.
        collectives: how to reach the other ranks.

    Raises:
        ValueError: on every rank, where nothing was counted, or no weight is large enough.
    """
    if row_map.warm_ids is None:
        return None
    least = row_map.storage.min_id_count
    if weights_V is None:
        assert counts is not None
        chosen_N = _most_seen(name, row_map, counts, collectives)
        if len(chosen_N) == 0:
            logger.warning("Table %r is not re-clustered: no id was seen %d times, so it stays as it is.", name, least)
    else:
        chosen_N = row_map.choose(weights_V)
        if len(chosen_N) == 0:
            raise ValueError(
                f"id_weights[{name!r}] has a maximum of {weights_V.max().item()}, but min_id_count={least} takes "
                f"ids of weights above {least - 1}: give counts as weights, or lower min_id_count."
            )
    return chosen_N.to(row_map.warm_ids.device)


def _most_seen(name: str, row_map: AssignedRowMap, counts: SumsById, collectives: Collectives) -> Tensor:
    """By the counts of all ranks, each of which looks through a block of the ids."""
    block = Block.of_rank(row_map.num_embeddings, 1, torch.device("cpu"), collectives)
    ids_U, counts_U1 = gather_block(counts, block, collectives).sums()
    if int(collectives.all_reduce_sum(torch.tensor(len(ids_U)))) == 0:
        raise ValueError(
            f"Table {name!r} stores assignments of the {len(row_map.assignments)} ids seen most often, but none of its ids "
            f"was seen yet (in training mode, with gradients): train first, or pass id_weights={{{name!r}: ...}}."
        )
    return choose_among_ranks(ids_U, counts_U1[:, 0], row_map.choose, collectives)
