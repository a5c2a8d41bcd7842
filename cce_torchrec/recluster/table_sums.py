"""What is added up while the ids of one table go by in a re-clustering, and what is made of it; shapes as in table.py."""

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_rows
from cce_torchrec.methods.assignments import COLD_ROW, find_sorted
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.table_state import TableState, Vectors
from cce_torchrec.recluster.vocabulary import id_weights


def _zeros(*shape: int, like: Tensor) -> Tensor:
    """Where to add up: float64, so that the order in which ranks add hardly shows."""
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


class TableSums:
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

    def add(self, ids_N: Tensor, vectors: Vectors, are_cold: bool = False) -> Tensor:
        """Add up a batch of ids; returns their assignments [N, C * A].

        Args:
            ids_N: some ids.
            vectors: theirs.
            are_cold: whether they are to have the row of cold ids, not the nearest.
        """
        old_rows_CNR = self._state.rows(ids_N)
        if are_cold or not len(self._hot_H):
            return self._add_shared(ids_N, vectors, old_rows_CNR, are_cold)
        places_N, is_hot_N = find_sorted(self._hot_H, ids_N)
        shared_N, hot_N = (~is_hot_N).nonzero().view(-1), is_hot_N.nonzero().view(-1)
        assignments = ids_N.new_empty(len(ids_N), self._state.row_map.assignments_per_id)
        assignments[shared_N] = self._add_shared(ids_N[shared_N], vectors, old_rows_CNR[:, shared_N], False)
        self._add_hot(ids_N[hot_N], places_N[hot_N], vectors, old_rows_CNR[:, hot_N])
        assignments[hot_N] = self._state.row_map.level_rows + places_N[hot_N, None]
        return assignments

    def _add_shared(self, ids_N: Tensor, vectors: Vectors, old_rows_CNR: Tensor, are_cold: bool) -> Tensor:
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
                if are_cold:
                    assigned_N = torch.full_like(ids_N, COLD_ROW)
                else:
                    assigned_N, _ = assign_nearest(points_ND, centroids_KD)
                points_ND = points_ND - centroids_KD[assigned_N]
                assignments.append(assigned_N)
                new_rows.append(assigned_N + level * len(centroids_KD))
            self._energy[1] += points_ND.double().square().sum(dim=1) @ weights_N
            if helpers_CN is not None:
                self._residual[column].index_add_(0, helpers_CN[column], points_ND.double() * weights_N[:, None])
                new_rows.append(helpers_CN[column] + self._first_helper)
            self._move(column, old_rows_CNR[column], new_rows, weights_N)
        return torch.stack(assignments, dim=1)

    def _add_hot(self, ids_N: Tensor, places_N: Tensor, vectors: Vectors, old_rows_CNR: Tensor) -> None:
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
