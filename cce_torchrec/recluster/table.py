"""One table's re-clustering: from its codebooks and assignments to new ones, nothing changed yet.

    x_i(v) = where M_i[h_i(v)] + M'_i[h'_i(v)] wants to be       as recorded gradients tell, see gradients.py, else there
    M_i   <- K-means centroids of x_i,   h_i(v) <- nearest       fitted on a sample, assigned exactly
    M'_i[j] <- mean of x_i(v) - M_i[h_i(v)] over h'_i(v) = j     with a fresh hash h'_i

Where a column has several codebooks with assignments, the second is fitted and assigned on the residuals of the first,
and so on; M' is the mean of what the last one leaves.

Where only some ids have stored assignments, K-means is fitted to those, with a centroid less, and moves those; the others
share the first row, M_i[0] <- mean of x_i(v) over them, and count in the mean residuals.

The hot ids are not clustered: each takes its vector along, H[j] <- x(v) / R for the R times that its row is added up, and
those that are no longer hot are clustered with the others.

Each rank decodes and assigns its own block of ids; only sums, and at the end the assignments, travel.

Shapes: V ids, N ids of a batch, H hot ids, C columns, A codebooks with assignments a column, K rows of each, R rows of a
column (A * K main, then hot, then helper rows), D dims of a column, S optimizer-state values a row.
"""

from torch import Tensor

from cce_torchrec.hashing import derive_seed
from cce_torchrec.methods.assignments import find_sorted
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.fit import fit_centroids
from cce_torchrec.recluster.gradients import gather_sums, most_sensitive_ids, targets_from
from cce_torchrec.recluster.table_state import NewTable, TableState, Vectors
from cce_torchrec.recluster.table_sums import TableSums
from cce_torchrec.recluster.vocabulary import (
    Block,
    check_finite,
    gather_assignments,
    moved_fraction,
    moved_sample,
)
from cce_torchrec.sums_by_id import SumsById


def recluster_table(state: TableState, *, seed: int, config: ReclusterConfig, collectives: Collectives) -> NewTable:
    """Cluster one table; collective, and the same on every rank up to rounding whatever their number.

    Raises:
        ValueError: on every rank, where weights are not finite.
        RuntimeError: on every rank, where another rank failed.
    """
    for column, codebook in enumerate(state.codebooks):
        check_finite(state.name, f"column {column}", codebook, codebook.shape[1])
    row_map, device, chosen = state.row_map, state.codebooks[0].device, state.chosen_ids
    block = Block.of_rank(row_map.num_embeddings, config.decode_batch_size, device, collectives, chosen)
    recorded = gather_sums(state.gradients, block.span(row_map.num_embeddings), collectives)
    hot_H = _choose_hot_ids(state, recorded, chosen, collectives)
    vectors = _vectors(state, recorded, config, collectives)
    centroids = fit_centroids(state, vectors, block, hot_H, derive_seed(seed, state.name), config, collectives)
    coefficients = None
    if row_map.num_helper_rows:
        coefficients = row_map.draw_helper_coefficients(int(row_map.version) + 1, seed).to(block.device)
    sums = TableSums(state, centroids, hot_H, coefficients)
    assignments = row_map.assignments.new_empty(block.stop - block.start, row_map.encoding.width, device=device)
    batches = assignments.split(config.decode_batch_size)
    for ids_N, stored_NW in zip(block.batches(), batches, strict=False):  # an empty block still has one empty batch
        stored_NW.copy_(row_map.encoding.encode(sums.add(ids_N, vectors)))
    if chosen is not None:
        _add_cold_ids(sums, state, chosen, config, collectives)
    sums.reduce(collectives)
    places_N = moved_sample(row_map.num_embeddings if chosen is None else len(chosen), block)
    after_NA = row_map.encoding.decode(assignments[places_N - block.start])
    moved = moved_fraction(row_map.assigned(block.at(places_N)), after_NA, row_map.num_codes, collectives)
    if chosen is not None or len(row_map.assignments) == row_map.num_embeddings:  # this rank holds those of all ids
        assignments = gather_assignments(assignments, collectives)
    return NewTable(
        assignments=assignments,
        ids=chosen,
        helper_coefficients=coefficients,
        codebooks=sums.codebooks(),
        optimizer_state=sums.optimizer_state(),
        relative_squared_error=sums.relative_squared_error(),
        moved_fraction=moved,
        empty_clusters=sums.empty_clusters(),
    )


def _vectors(
    state: TableState, recorded: SumsById | None, config: ReclusterConfig, collectives: Collectives
) -> Vectors:
    """What is clustered; collective."""
    is_first = int(state.row_map.version) == 0
    device = state.codebooks[0].device
    return Vectors(state, targets_from(recorded, state.decode if is_first else None, config, device, collectives))


def _choose_hot_ids(
    state: TableState, recorded: SumsById | None, chosen: Tensor | None, collectives: Collectives
) -> Tensor:
    """Those of the largest weights; where none were given, those on which the loss depends most, as far as was recorded.

    Only ids with stored assignments: a row of its own is one.
    """
    number = state.row_map.storage.num_hot_ids
    if number == 0 or state.weights_V is not None or recorded is None:
        found_H = state.row_map.choose_hot_ids(state.weights_V)
    else:
        found_H = most_sensitive_ids(recorded, number, collectives).to(state.codebooks[0].device)
    return found_H if chosen is None else found_H[find_sorted(chosen, found_H)[1]]


def _add_cold_ids(
    sums: TableSums, state: TableState, chosen: Tensor, config: ReclusterConfig, collectives: Collectives
) -> None:
    """Count the ids that have no stored assignments, each rank its share."""
    row_map = state.row_map
    block = Block.of_rank(row_map.num_embeddings, config.decode_batch_size, chosen.device, collectives)
    recorded = gather_sums(state.gradients, block, collectives)
    vectors = _vectors(state, recorded, config, collectives)
    for ids_N in block.batches():
        cold_N = ids_N[~find_sorted(chosen, ids_N)[1]]
        sums.add(cold_N, vectors, are_cold=True)
