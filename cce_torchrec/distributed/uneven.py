"""Batch sizes that differ between ranks, under row-wise types on gloo.

TorchRec reduce-scatters pooled vectors; where batch sizes differ, its backward gathers tensors of different sizes, which NCCL
can do and gloo cannot. Here the batches of all ranks are filled up with zeros to the largest for that collective.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable, PooledEmbeddingsReduceScatter
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist


class PaddedReduceScatter(PooledEmbeddingsReduceScatter):
    """A reduce-scatter of equal parts, whatever the batch sizes."""

    def forward(self, local_embs: Tensor, input_splits: list[int] | None = None) -> PooledEmbeddingsAwaitable:
        """Sum pooled vectors over ranks; each gets those of its batch.

        Args:
            local_embs: [sum of all batch sizes, D].
            input_splits: the batch sizes by rank.
        """
        if input_splits is None or len(set(input_splits)) <= 1:
            return super().forward(local_embs, input_splits)
        most, own = max(input_splits), input_splits[dist.get_rank(self._pg)]
        parts = [pad(part, (0, 0, 0, most - len(part))) for part in local_embs.split(input_splits)]
        awaitable = super().forward(torch.cat(parts))
        awaitable.callbacks.append(lambda pooled: pooled[:own])
        return awaitable


def allow_uneven_batches(output_dists: list[nn.Module], group: dist.ProcessGroup) -> None:
    """Give the output dists of row-wise types, on gloo, a reduce-scatter that takes any batch sizes."""
    if "gloo" not in dist.get_backend(group):
        return
    for output_dist in output_dists:
        if isinstance(output_dist, RwPooledEmbeddingDist):
            output_dist._dist = PaddedReduceScatter(output_dist._pg, output_dist._codecs)
        elif isinstance(output_dist, TwRwPooledEmbeddingDist | GridPooledEmbeddingDist):
            output_dist._create_output_dist_modules()
            output_dist._intra_dist = PaddedReduceScatter(output_dist._intra_pg, output_dist._intra_codecs)
