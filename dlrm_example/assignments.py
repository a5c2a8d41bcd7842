"""How evenly the ids of a table use its codebooks: counts of learned assignments, and their entropy.

Shape suffixes: V ids, N some of them, A assignments an id, K clusters.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cce_torchrec.lowering import LoweredTable, Table
from cce_torchrec.methods.base import id_chunks
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables

_IDS_AT_ONCE = 1 << 22


def assignment_counts(model: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """A table, a column, and how many ids each cluster of it has, [K] on the CPU, for all tables that can be re-clustered.

    Columns are the table's, times the levels of residual CCE; clusters of CCE on circular memory are offsets. To be iterated
    by all ranks: it is collective where they hold blocks of the assignments. Ids with rows of their own are not counted.
    """
    for collection in model.modules():
        if isinstance(collection, Collection):
            for table in reclusterable_tables(collection):
                yield from ((table.name, column, counts_K) for column, counts_K in enumerate(_counts_of(table)))


def entropy_bits(counts_K: Tensor) -> float:
    """Of the clusters, weighted by their ids: log2(K) where all have as many, 0 where one has all."""
    shares_K = counts_K.double() / counts_K.sum()
    return float(torch.special.entr(shares_K).sum()) / math.log(2)


def _counts_of(table: Table) -> Iterator[Tensor]:
    stored = table.row_map if isinstance(table, LoweredTable) else table.decoder
    if isinstance(stored, CCERobeDecoder):
        yield from (_counts(offsets_V, len(stored.memory)).cpu() for offsets_V in stored.offsets.T)
        return
    assert isinstance(stored, CCERowMap)
    counts_AK = _assigned_counts(stored)
    if stored.warm_ids is None and len(stored.assignments) < stored.num_embeddings:  # a block: others have the rest
        dist.all_reduce(counts_AK)
    yield from counts_AK.cpu()


def _assigned_counts(row_map: CCERowMap) -> Tensor:
    """Of the ids of this rank, however their assignments are stored; ids without one count where they are hashed to."""
    num_ids = row_map.num_embeddings if row_map.warm_ids is not None else len(row_map.assignments)
    device = row_map.assignments.device
    counts_AK = torch.zeros(row_map.assignments_per_id, row_map.num_values, dtype=torch.int64, device=device)
    for ids_N in id_chunks(num_ids, device, _IDS_AT_ONCE):
        for counts_K, clusters_N in zip(counts_AK, row_map.assigned(ids_N + row_map.first_id).T, strict=True):
            counts_K += _counts(clusters_N[clusters_N < row_map.num_values], row_map.num_values)
    return counts_AK


def _counts(clusters_V: Tensor, num_clusters: int) -> Tensor:
    counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=clusters_V.device)
    for clusters_N in clusters_V.split(_IDS_AT_ONCE):
        counts_K += torch.bincount(clusters_N.long(), minlength=num_clusters)
    return counts_K
