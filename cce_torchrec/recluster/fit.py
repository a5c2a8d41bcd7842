"""Fitting one table's centroids: K-means, column by column, on a sample of its ids.

Each rank samples its own ids. Where the ranks divide the columns evenly, each rank then gets the whole sample of its own
columns and fits them without another message; else the ranks share the fits of all columns, which go in step. Both find the
same centroids, up to rounding. Where only some ids have stored assignments, the first row is that of the others, see cold.py.

Shapes: N ids of the sample, C columns, A codebooks with assignments a column, K rows of each, D dims of a column.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cce_torchrec.hashing import derive_seed
from cce_torchrec.methods.assignments import find_sorted
from cce_torchrec.recluster.cold import cold_rows
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.kmeans import kmeans_steps
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.table_state import TableState, Vectors
from cce_torchrec.recluster.together import run_together
from cce_torchrec.recluster.vocabulary import Block, sample
from cce_torchrec.recluster.workspace import columns_of_a_rank, columns_together


def fit_centroids(
    state: TableState,
    vectors: Vectors,
    block: Block,
    hot_H: Tensor,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> list[Tensor]:
    """The row of cold ids, where there are such, and K-means for the others: [A, K, D] of each column; collective."""
    num_rows = state.row_map.level_rows
    has_cold_row = block.ids is not None and len(block.ids) < state.row_map.num_embeddings and num_rows > 1
    centroids = _fit_shared_rows(state, num_rows - has_cold_row, vectors, block, hot_H, seed, config, collectives)
    if not has_cold_row:
        return centroids
    cold = cold_rows(state, vectors, block, seed, config, collectives)
    return [torch.cat(rows, dim=1) for rows in zip(cold, centroids, strict=True)]


def _fit_shared_rows(
    state: TableState,
    num_rows: int,
    vectors: Vectors,
    block: Block,
    hot_H: Tensor,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> list[Tensor]:
    """K-means on a sample of the ids of a block that are not hot: [A, K, D] of each column; collective."""
    columns = range(len(state.codebooks))
    size = config.points_per_centroid * num_rows
    num_ids = state.row_map.num_embeddings if block.ids is None else len(block.ids)
    ids_N, weights_N = sample(state.weights_V, num_ids, block, size, derive_seed(seed, "sample"), collectives)
    if len(hot_H):
        is_shared_N = ~find_sorted(hot_H, ids_N)[1]
        ids_N, weights_N = ids_N[is_shared_N], weights_N[is_shared_N]
        if float(collectives.all_reduce_sum(weights_N.sum()[None])) == 0:  # all that matter are hot
            shape = state.row_map.num_assigned, num_rows
            return [codebook.new_zeros(*shape, codebook.shape[1]) for codebook in state.codebooks]
    batches = ids_N.split(config.decode_batch_size)
    if own := columns_of_a_rank(state.row_map, config, collectives.world_size):
        points = _points(vectors, columns, batches)
        return _fit_own_columns(state, num_rows, points, own, ids_N, weights_N, seed, config, collectives)
    together = columns_together(state.row_map, config, collectives.world_size)
    centroids = []
    for start in columns[::together]:
        points = _points(vectors, columns[start : start + together], batches)
        centroids += _fit_levels(state, num_rows, points, ids_N, weights_N, seed, config, collectives)
    return centroids


def _points(vectors: Vectors, columns: Iterable[int], batches: Sequence[Tensor]) -> dict[int, Tensor]:
    """The vectors of the sample by column, [N, D] of each."""
    parts = {column: [vectors.state.codebooks[column][:0]] for column in columns}
    for ids_N in batches:
        rows_CNR = vectors.state.rows(ids_N)
        for column, of_column in parts.items():
            of_column.append(vectors(column, ids_N, rows_CNR[column]))
    return {column: torch.cat(of_column) for column, of_column in parts.items()}


def _fit_own_columns(
    state: TableState,
    num_rows: int,
    points: dict[int, Tensor],
    own: int,
    ids_N: Tensor,
    weights_N: Tensor,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> list[Tensor]:
    """K-means of ``own`` columns on every rank, each on the points of all ranks: [A, K, D] of each column of the table."""
    ids_N, weights_N = collectives.all_gather_rows(ids_N), collectives.all_gather_rows(weights_N)
    mine = [  # a column of every rank at a time: those of rank r are r * own and the next; none is held twice
        collectives.exchange_rows([points.pop(column) for column in range(turn, len(state.codebooks), own)])
        for turn in range(own)
    ]
    centroids = []
    for turn in range(own):
        of_column = {collectives.rank * own + turn: mine.pop(0)}
        centroids += _fit_levels(state, num_rows, of_column, ids_N, weights_N, seed, config, collectives.alone())
    return list(collectives.all_gather_rows(torch.stack(centroids)))


def _fit_levels(
    state: TableState,
    num_rows: int,
    points: dict[int, Tensor],
    ids_N: Tensor,
    weights_N: Tensor,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> list[Tensor]:
    """K-means of some columns together, level by level: [A, K, D] of each column."""
    levels: list[list[Tensor]] = []
    for level in range(state.row_map.num_assigned):
        if level:
            for (column, points_ND), centroids_KD in zip(points.items(), levels[-1], strict=True):
                points[column] = points_ND - centroids_KD[assign_nearest(points_ND, centroids_KD)[0]]
        fits = [
            kmeans_steps(
                points_ND,
                num_rows,
                seed=derive_seed(seed, column, *([level] if level else [])),
                point_ids_N=ids_N,
                weights_N=weights_N,
                num_iterations=config.num_iterations,
                tolerance=config.tolerance,
            )
            for column, points_ND in points.items()
        ]
        levels.append([result.centroids_KD for result in run_together(fits, collectives)])
    return [torch.stack(of_column) for of_column in zip(*levels, strict=True)]
