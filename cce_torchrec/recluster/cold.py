"""Where the ids without stored assignments go: one row of each codebook, the mean of their vectors.

    M_i[0] = sum_v w_v x_i(v) / sum_v w_v                           over the cold ids v; over all where no cold id weighs

It is taken from a sample of all ids. Further codebooks of a column have zeros there: nothing is left of a mean.

Shapes: N ids of the sample, C columns, A codebooks with assignments a column, D dims of a column, E = 1 + C * D.
"""

import torch
from torch import Tensor

from cce_torchrec.hashing import derive_seed
from cce_torchrec.methods.assignments import find_sorted
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.table_state import TableState, Vectors
from cce_torchrec.recluster.vocabulary import Block, sample


def cold_rows(
    state: TableState, vectors: Vectors, block: Block, seed: int, config: ReclusterConfig, collectives: Collectives
) -> list[Tensor]:
    """The row of the cold ids, those not in the list of ``block``, in each codebook: [A, 1, D] of each column; collective."""
    assert block.ids is not None
    num_ids, levels = state.row_map.num_embeddings, state.row_map.num_assigned
    size = config.points_per_centroid * state.row_map.level_rows
    ids_N, weights_N = sample(
        state.weights_V, num_ids, block.span(num_ids), size, derive_seed(seed, "cold"), collectives
    )
    sums_2E = weights_N.new_zeros(2, 1 + sum(codebook.shape[1] for codebook in state.codebooks))
    batches = (part_N.split(config.decode_batch_size) for part_N in (ids_N, weights_N))
    for some_N, mass_N in zip(*batches, strict=True):
        rows_CNR = state.rows(some_N)
        parts = [vectors(column, some_N, rows_NR) for column, rows_NR in enumerate(rows_CNR)]
        weighted_NE = torch.cat([mass_N.new_ones(len(some_N), 1), *parts], dim=1) * mass_N[:, None]
        sums_2E[0] += weighted_NE[~find_sorted(block.ids, some_N)[1]].sum(dim=0)
        sums_2E[1] += weighted_NE.sum(dim=0)
    cold_E, all_E = collectives.all_reduce_sum(sums_2E)
    mean_E = cold_E / cold_E[0] if cold_E[0] > 0 else all_E / all_E[0]
    means = mean_E[1:].split([codebook.shape[1] for codebook in state.codebooks])
    first_A11 = (torch.arange(levels, device=block.device) == 0)[:, None, None]
    return [(mean_D * first_A11).to(book.dtype) for mean_D, book in zip(means, state.codebooks, strict=True)]
