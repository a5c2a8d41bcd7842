"""How much memory a re-clustering takes beside the model, before it is run.

    held        new assignments and codebooks, from a table's turn until all tables are put in place together
    transient   one table's turn: its old codebooks, a sample of its ids, sums, and batches of ids

Turns come one after another, so a device needs the sum of what is held and the largest of what is transient.

Shapes: P parameters, V ids, C columns of d dims, A codebooks with assignments a column, K rows of each, R rows an id and
column, N points of the sample on one rank, B ids of a batch.
"""

from typing import NamedTuple

from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native.nearest import MAX_BOUND_BYTES, MAX_GROUPS
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.nearest import CPU_BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS

_FITTED_BYTES = 2**28  # of the sample of all columns that are fitted together, or by one rank, if more than one is
_SPREAD = 1.1  # the sample is a random one, of about its size
_POINT_BYTES = 128  # of a sampled id, beside its vector: ids, weights, distances and draws, in 8 bytes each
_ID_BYTES = 96  # of an id of a batch, beside its vector and rows
_VECTOR_COPIES = 6  # of 4 bytes: float32 vectors, residuals, and their float64 forms


class Workspace(NamedTuple):
    """Bytes on one device that a re-clustering of one table takes."""

    held: int
    transient: int


def recluster_workspace(
    row_map: CCERowMap,
    config: ReclusterConfig,
    world_size: int,
    device_type: str,
    is_sharded: bool = False,
    optimizer_bytes: int = 0,
) -> Workspace:
    """An upper bound of what :func:`cce_torchrec.recluster` takes for one table on one of ``world_size`` devices.

    Args:
        row_map: of the table, whole; may be on "meta".
        config: of the re-clustering, which is to have no ``id_weights``.
        world_size: ranks that share the work.
        device_type: "cpu" or "cuda", which hold different numbers of distances at a time.
        is_sharded: whether each rank holds the assignments of its own ids only.
        optimizer_bytes: of the state of all rows of the codebooks, in float32, which may be carried.

    Example:
        >>> import torch
        >>> from cce_torchrec import CCE
        >>> row_map = CCE(num_rows=256, num_columns=4).row_map("t", 1_000_000, 32, torch.device("meta"))
        >>> recluster_workspace(row_map, ReclusterConfig(), 1, "cpu").held
        4065536
    """
    num_ids, columns, dim = row_map.num_embeddings, len(row_map.columns), row_map.columns[0].dim
    params = 4 * sum(column.num_rows * column.dim for column in row_map.columns)
    rows = sum(column.num_rows for column in row_map.columns)
    row_bytes = row_map.encoding.width * row_map.encoding.dtype.itemsize
    assignments = len(row_map.assignments) * row_bytes
    share = -(-num_ids // world_size)
    own_assignments = -(-len(row_map.assignments) // world_size) * row_bytes
    chosen = 8 * (row_map.storage.num_hot_ids + (0 if row_map.warm_ids is None else len(row_map.warm_ids)))
    carried = optimizer_bytes if config.optimizer_state == "carry" else 0
    held = (own_assignments if is_sharded else assignments) + params + chosen + carried
    if own := columns_of_a_rank(row_map, config, world_size):
        points, sample = _sampled_ids(row_map, config, 1), _own_bytes(row_map, config, own)
    else:
        points = _sampled_ids(row_map, config, world_size)
        sample = columns_together(row_map, config, world_size) * _sample_bytes(row_map, config, world_size)
    batch = min(config.decode_batch_size, share)
    lookups = columns * row_map.rows_per_id * 8
    batches = batch * (_ID_BYTES + 3 * lookups + _VECTOR_COPIES * 4 * dim)
    books = 2 * params + 2 * (2 * 8 * rows + 2 * params) + 3 * 8 * row_map.level_rows * (dim + 1)
    books += carried + 4 * 2 * carried  # as it was; float64 sums, of all ranks, and their means
    at_once = CUDA_BLOCK_ELEMENTS if device_type == "cuda" else CPU_BLOCK_ELEMENTS
    padded_rows = row_map.level_rows + 64
    scores = 4 * min(max(points, batch) * padded_rows, max(at_once, 64 * padded_rows))
    gathered = 0 if is_sharded or world_size == 1 else assignments + 2 * own_assignments
    return Workspace(held=held, transient=books + max(max(sample, batches) + scores, gathered))


def columns_of_a_rank(row_map: CCERowMap, config: ReclusterConfig, world_size: int) -> int:
    """Columns that each of several ranks fits whole; 0 where they cannot be shared out evenly, or not in 256 MiB."""
    own, left = divmod(len(row_map.columns), world_size)
    if world_size == 1 or left or _own_bytes(row_map, config, own) > _FITTED_BYTES:
        return 0
    return own


def columns_together(row_map: CCERowMap, config: ReclusterConfig, world_size: int) -> int:
    """Columns that ranks fit in step, where they share fits: one where nothing travels, else what 256 MiB hold, evenly."""
    columns = len(row_map.columns)
    if world_size == 1:
        return 1
    at_most = max(1, _FITTED_BYTES // _sample_bytes(row_map, config, world_size))
    return -(-columns // -(-columns // at_most))


def _own_bytes(row_map: CCERowMap, config: ReclusterConfig, own: int) -> int:
    """Of the whole sample of a rank's own columns, one of which is being fitted."""
    vectors = 4 * row_map.columns[0].dim * _sampled_ids(row_map, config, 1)
    return own * vectors + _sample_bytes(row_map, config, 1)


def _sample_bytes(row_map: CCERowMap, config: ReclusterConfig, world_size: int) -> int:
    """Of one column of the sample, its bounds included."""
    points = _sampled_ids(row_map, config, world_size)
    per_point = _POINT_BYTES + 3 * 4 * row_map.columns[0].dim
    return points * per_point + min(MAX_BOUND_BYTES, points * 4 * MAX_GROUPS)


def _sampled_ids(row_map: CCERowMap, config: ReclusterConfig, world_size: int) -> int:
    """Of one rank, at most."""
    sampled = int(_SPREAD * config.points_per_centroid * row_map.level_rows)
    return min(-(-row_map.num_embeddings // world_size), -(-sampled // world_size) + 1000)
