"""How evenly the ids of a table use its codebooks: counts of learned assignments, and their entropy.

Shape suffixes: V ids, C columns of assignments, K clusters.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.recluster.step import Collection, reclusterable_tables

_IDS_AT_ONCE = 1 << 22


def assignment_counts(model: nn.Module) -> dict[str, Tensor]:
    """By table that can be re-clustered, [C, K] on the CPU: how many ids each cluster of each column has.

    A column is one of the table's assignments: c of them, times the levels of residual CCE. Collective where ranks hold
    blocks of the assignments.
    """
    tables = [
        table
        for collection in model.modules()
        if isinstance(collection, Collection)
        for table in reclusterable_tables(collection)
    ]
    counts = {}
    for table in tables:
        stored = table.row_map if isinstance(table, LoweredTable) else table.decoder
        if isinstance(stored, CCERobeDecoder):
            counts[table.name] = _counts(stored.offsets, len(stored.memory)).cpu()
            continue
        assert isinstance(stored, CCERowMap)
        counts_CK = _counts(stored.assignments, stored.level_rows)
        if len(stored.assignments) < stored.num_embeddings:  # a block of ids: the others are on other ranks
            dist.all_reduce(counts_CK)
        counts[table.name] = counts_CK.cpu()
    return counts


def entropy_bits(counts_CK: Tensor) -> list[float]:
    """Of each column's clusters, weighted by their ids: log2(K) where all have as many, 0 where one has all."""
    shares_CK = counts_CK.double() / counts_CK.sum(1, keepdim=True)
    bits: list[float] = (-torch.special.xlogy(shares_CK, shares_CK).sum(1) / math.log(2)).tolist()
    return bits


def _counts(clusters_VC: Tensor, num_clusters: int) -> Tensor:
    counts_CK = torch.zeros(clusters_VC.shape[1], num_clusters, dtype=torch.int64, device=clusters_VC.device)
    for part_NC in clusters_VC.split(_IDS_AT_ONCE):
        for column, clusters_N in enumerate(part_NC.T):
            counts_CK[column] += torch.bincount(clusters_N.long(), minlength=num_clusters)
    return counts_CK
