"""One table's re-clustering: from its codebooks and assignments to new ones, nothing changed yet.

    x_i(v) = M_i[h_i(v)] + M'_i[h'_i(v)] + step_i(v)             where the column vectors of all ids v want to be
    M_i   <- K-means centroids of x_i,   h_i(v) <- nearest       fitted on a sample, assigned exactly
    M'_i[j] <- mean of x_i(v) - M_i[h_i(v)] over h'_i(v) = j     with a fresh hash h'_i

Where a column has several codebooks with assignments, the second is fitted and assigned on the residuals of the first,
and so on; M' is the mean of what the last one leaves.

Where only some ids have stored assignments, K-means is fitted to those and moves those; the others keep the hash that they
have, and count in the mean residuals.

The hot ids are not clustered: each takes its vector along, H[j] <- x(v) / R for the R times that its row is added up, and
those that are no longer hot are clustered with the others.

Each rank decodes and assigns its own block of ids; only sums, and at the end the assignments, travel.

Shapes: V ids, N ids of a batch, H hot ids, C columns, A codebooks with assignments a column, K rows of each, R rows of a
column (A * K main, then hot, then helper rows), D dims of a column, S optimizer-state values a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_torchrec.hashing import derive_seed, hash_rows
from cce_torchrec.methods.assignments import find_sorted
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.gradients import IdSteps, gather_sums, most_sensitive_ids, steps_from
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.vocabulary import (
    Block,
    check_finite,
    gather_assignments,
    id_weights,
    moved_fraction,
    moved_sample,
    sample,
)
from cce_torchrec.sums_by_id import SumsById


@dataclass(frozen=True, kw_only=True)
class TableState:
    """All that one table is made of, whole on every rank.

    Attributes:
        name: of the logical table.
        row_map: assignments and hashes, to be replaced.
        rows: ids to the rows of ``codebooks`` that add up to their vectors, [C, N, rows an id]: those of ``row_map``, or of
            another table that is to be approximated.
        codebooks: float32 of each column: main rows, then helper rows; or those of the other table.
        optimizer_state: S numbers a row of each column, float32; S may be 0, and is for another table.
        weights_V: importance of each id, or ``None`` for 1.
        chosen_ids: those that are to have stored assignments, in rising order; ``None`` for all.
        gradients: recorded on this rank, or ``None`` for no step.
    """

    name: str
    row_map: CCERowMap
    rows: Callable[[Tensor], Tensor]
    codebooks: list[Tensor]
    optimizer_state: list[Tensor]
    weights_V: Tensor | None
    chosen_ids: Tensor | None = None
    gradients: SumsById | None = None


@dataclass(frozen=True, kw_only=True)
class NewTable:
    """What replaces a :class:`TableState`, and how good it is.

    ``assignments`` are encoded, of the ids that the row map holds, or of the chosen ``ids``.
    """

    assignments: Tensor
    ids: Tensor | None
    helper_coefficients: Tensor | None
    codebooks: list[Tensor]
    optimizer_state: list[Tensor]
    relative_squared_error: float
    moved_fraction: float
    empty_clusters: int


def recluster_table(state: TableState, *, seed: int, config: ReclusterConfig, collectives: Collectives) -> NewTable:
    """Cluster one table; collective, and the same on every rank up to rounding whatever their number.

    Raises:
        ValueError: on every rank, where weights are not finite.
    """
    for column, codebook in enumerate(state.codebooks):
        check_finite(state.name, f"column {column}", codebook, codebook.shape[1])
    row_map, device, chosen = state.row_map, state.codebooks[0].device, state.chosen_ids
    block = Block.of_rank(row_map.num_embeddings, config.decode_batch_size, device, collectives, chosen)
    recorded = gather_sums(state.gradients, block.span(row_map.num_embeddings), collectives)
    hot_H = _choose_hot_ids(state, recorded, chosen, collectives)
    vectors = _Vectors(state, steps_from(recorded, config, device, collectives))
    centroids = _fit_centroids(state, vectors, block, hot_H, derive_seed(seed, state.name), config, collectives)
    coefficients = None
    if row_map.num_helper_rows:
        coefficients = row_map.draw_helper_coefficients(int(row_map.version) + 1, seed).to(block.device)
    sums = _Sums(state, centroids, hot_H, coefficients)
    assignments = row_map.assignments.new_empty(block.stop - block.start, row_map.encoding.width, device=device)
    batches = assignments.split(config.decode_batch_size)
    for ids_N, stored_NW in zip(block.batches(), batches, strict=False):  # an empty block still has one empty batch
        stored_NW.copy_(row_map.encoding.encode(sums.add(ids_N, vectors)))
    if chosen is not None:
        _add_hashed_ids(sums, state, chosen, config, collectives)
    sums.reduce(collectives)
    places_N = moved_sample(row_map.num_embeddings if chosen is None else len(chosen), block)
    after_CN = row_map.encoding.decode(assignments[places_N - block.start]).T.to(torch.int64)
    moved = moved_fraction(row_map.main_rows(block.at(places_N)), after_CN, row_map.num_codes, collectives)
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


def _add_hashed_ids(
    sums: "_Sums", state: TableState, chosen: Tensor, config: ReclusterConfig, collectives: Collectives
) -> None:
    """Count the ids that have no stored assignments, each rank its share."""
    row_map = state.row_map
    block = Block.of_rank(row_map.num_embeddings, config.decode_batch_size, chosen.device, collectives)
    recorded = gather_sums(state.gradients, block, collectives)
    vectors = _Vectors(state, steps_from(recorded, config, chosen.device, collectives))
    for ids_N in block.batches():
        hashed_N = ids_N[~find_sorted(chosen, ids_N)[1]]
        sums.add(hashed_N, vectors, row_map.hashed(hashed_N))


@dataclass(frozen=True)
class _Vectors:
    """The column vectors to cluster: what ids decode to, and their steps."""

    state: TableState
    steps: IdSteps | None

    def __call__(self, column: int, ids_N: Tensor, rows_NR: Tensor) -> Tensor:
        """[N, D] of some ids, given the rows of the column that they add up."""
        codebook = self.state.codebooks[column]
        decoded_ND = codebook[rows_NR].sum(dim=1)
        if self.steps is None:
            return decoded_ND
        dim = codebook.shape[1]
        return decoded_ND + self.steps(ids_N, slice(column * dim, (column + 1) * dim))


def _fit_centroids(
    state: TableState,
    vectors: _Vectors,
    block: Block,
    hot_H: Tensor,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> list[Tensor]:
    """K-means on a sample of the ids that are not hot, column by column and level by level: [A, K, D] of each column."""
    num_rows = state.row_map.level_rows
    size = config.points_per_centroid * num_rows
    num_ids = state.row_map.num_embeddings if block.ids is None else len(block.ids)
    ids_N, weights_N = sample(state.weights_V, num_ids, block, size, derive_seed(seed, "sample"), collectives)
    if len(hot_H):
        is_shared_N = ~find_sorted(hot_H, ids_N)[1]
        ids_N, weights_N = ids_N[is_shared_N], weights_N[is_shared_N]
        if float(collectives.all_reduce_sum(weights_N.sum()[None])) == 0:  # all that matter are hot
            shape = state.row_map.num_assigned, num_rows
            return [codebook.new_zeros(*shape, codebook.shape[1]) for codebook in state.codebooks]
    centroids = []
    for column, codebook in enumerate(state.codebooks):
        batches = ids_N.split(config.decode_batch_size)
        points_ND = torch.cat(
            [codebook[:0], *(vectors(column, batch_N, state.rows(batch_N)[column]) for batch_N in batches)]
        )
        levels: list[Tensor] = []
        for level in range(state.row_map.num_assigned):
            if level:
                points_ND = points_ND - levels[-1][assign_nearest(points_ND, levels[-1])[0]]
            result = kmeans(
                points_ND,
                num_rows,
                seed=derive_seed(seed, column, *([level] if level else [])),
                point_ids_N=ids_N,
                weights_N=weights_N,
                num_iterations=config.num_iterations,
                tolerance=config.tolerance,
                collectives=collectives,
            )
            levels.append(result.centroids_KD)
        centroids.append(torch.stack(levels))
    return centroids


def _zeros(*shape: int, like: Tensor) -> Tensor:
    """Where to add up: float64, so that the order in which ranks add hardly shows."""
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


class _Sums:
    """What is added up while the ids go by, for all columns."""

    def __init__(
        self, state: TableState, centroids: list[Tensor], hot_H: Tensor, helper_coefficients: Tensor | None
    ) -> None:
        self._state, self._centroids, self._helper_coefficients = state, centroids, helper_coefficients
        self._hot_H, row_map, books = hot_H, state.row_map, state.codebooks
        num_rows = row_map.columns[0].num_rows
        self._num_main, self._first_helper = row_map.num_main_rows, row_map.first_helper_row
        self._energy = _zeros(2, like=books[0])  # sum of |x|^2, sum of |x - centroid|^2
        self._usage = [_zeros(num_rows, like=book) for book in books]  # ids a row
        self._mass = [_zeros(num_rows, like=book) for book in books]  # weight a row
        self._own = [_zeros(row_map.storage.num_hot_ids, book.shape[1], like=book) for book in books]
        self._residual = [_zeros(row_map.num_helper_rows, book.shape[1], like=book) for book in books]
        self._optimizer = [_zeros(num_rows, old.shape[1], like=old) for old in state.optimizer_state]

    def add(self, ids_N: Tensor, vectors: _Vectors, hashed_AN: Tensor | None = None) -> Tensor:
        """Add up a batch of ids; returns their assignments [N, C * A].

        Args:
            ids_N: some ids.
            vectors: theirs.
            hashed_AN: their assignments, where they are not to have the nearest.
        """
        old_rows_CNR = self._state.rows(ids_N)
        if hashed_AN is not None or not len(self._hot_H):
            return self._add_shared(ids_N, vectors, old_rows_CNR, hashed_AN)
        places_N, is_hot_N = find_sorted(self._hot_H, ids_N)
        shared_N, hot_N = (~is_hot_N).nonzero().view(-1), is_hot_N.nonzero().view(-1)
        assignments = ids_N.new_empty(len(ids_N), self._state.row_map.assignments_per_id)
        assignments[shared_N] = self._add_shared(ids_N[shared_N], vectors, old_rows_CNR[:, shared_N], None)
        self._add_hot(ids_N[hot_N], places_N[hot_N], vectors, old_rows_CNR[:, hot_N])
        assignments[hot_N] = self._state.row_map.level_rows + places_N[hot_N, None]
        return assignments

    def _add_shared(self, ids_N: Tensor, vectors: _Vectors, old_rows_CNR: Tensor, hashed_AN: Tensor | None) -> Tensor:
        weights_N = id_weights(self._state.weights_V, ids_N)
        helpers_CN: Tensor | None = None
        if self._helper_coefficients is not None:
            helpers_CN = hash_rows(ids_N, self._helper_coefficients, self._state.row_map.num_helper_rows)
        assignments: list[Tensor] = []
        for column, centroids_AKD in enumerate(self._centroids):
            points_ND = vectors(column, ids_N, old_rows_CNR[column])
            self._energy[0] += points_ND.double().square().sum(dim=1) @ weights_N
            new_rows = []
            for level, centroids_KD in enumerate(centroids_AKD):
                if hashed_AN is None:
                    assigned_N, _ = assign_nearest(points_ND, centroids_KD)
                else:
                    assigned_N = hashed_AN[len(assignments)]
                points_ND = points_ND - centroids_KD[assigned_N]
                assignments.append(assigned_N)
                new_rows.append(assigned_N + level * len(centroids_KD))
            self._energy[1] += points_ND.double().square().sum(dim=1) @ weights_N
            if helpers_CN is not None:
                self._residual[column].index_add_(0, helpers_CN[column], points_ND.double() * weights_N[:, None])
                new_rows.append(helpers_CN[column] + self._first_helper)
            self._move(column, old_rows_CNR[column], new_rows, weights_N)
        return torch.stack(assignments, dim=1)

    def _add_hot(self, ids_N: Tensor, places_N: Tensor, vectors: _Vectors, old_rows_CNR: Tensor) -> None:
        """Take the vectors of hot ids along, to the rows at some places among the hot ones."""
        weights_N = id_weights(self._state.weights_V, ids_N)
        rows_per_id = self._state.row_map.rows_per_id
        for column, old_rows_NR in enumerate(old_rows_CNR):
            points_ND = vectors(column, ids_N, old_rows_NR).double()
            self._energy[0] += points_ND.square().sum(dim=1) @ weights_N
            self._own[column][places_N] = points_ND / rows_per_id
            self._move(column, old_rows_NR, [self._num_main + places_N] * rows_per_id, weights_N)

    def _move(self, column: int, old_rows_NR: Tensor, new_rows: list[Tensor], weights_N: Tensor) -> None:
        """Count the rows that ids have from now on, and take the optimizer state of their old ones along."""
        old_state_RS = self._state.optimizer_state[column]
        for place, new_N in enumerate(new_rows):
            self._usage[column].index_add_(0, new_N, torch.ones_like(weights_N))
            self._mass[column].index_add_(0, new_N, weights_N)
            if old_state_RS.shape[1]:
                old_NS = old_state_RS[old_rows_NR[:, place]].double()
                self._optimizer[column].index_add_(0, new_N, old_NS * weights_N[:, None])

    def reduce(self, collectives: Collectives) -> None:
        """Add up over ranks; one collective."""
        parts = [self._energy, *self._usage, *self._mass, *self._own, *self._residual, *self._optimizer]
        total = collectives.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
        for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def _helper_means(self, column: int) -> Tensor:
        mass_R = self._mass[column][self._first_helper :, None]
        return torch.where(mass_R > 0, self._residual[column] / mass_R, 0)

    def codebooks(self) -> list[Tensor]:
        """Centroids, then the rows of hot ids, then mean residuals, of each column."""
        means = [self._helper_means(column) for column in range(len(self._centroids))]
        return [
            torch.cat([centroids.flatten(0, 1), own.to(centroids.dtype), mean.to(centroids.dtype)])
            for centroids, own, mean in zip(self._centroids, self._own, means, strict=True)
        ]

    def optimizer_state(self) -> list[Tensor]:
        """The mean old state over the ids of each new row; 0 for rows that none uses."""
        pairs = zip(self._optimizer, self._mass, strict=True)
        return [torch.where(mass[:, None] > 0, total / mass[:, None], 0).float() for total, mass in pairs]

    def relative_squared_error(self) -> float:
        """Of the decoded vectors; the helper means take their own energy out of the residual's."""
        before, residual = self._energy.tolist()
        for column in range(len(self._centroids)):
            mass_R = self._mass[column][self._first_helper :]
            residual -= float(self._helper_means(column).square().sum(dim=1) @ mass_R)
        return max(residual, 0.0) / before if before > 0 else 0.0

    def empty_clusters(self) -> int:
        """Main rows that no id uses."""
        return sum(int((usage[: self._num_main] == 0).sum()) for usage in self._usage)
