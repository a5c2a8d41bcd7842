"""What a re-clustering of one table starts from, and what it ends with; shapes as in table.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster.gradients import Targets
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
        gradients: recorded on this rank, or ``None`` where nothing was.
    """

    name: str
    row_map: CCERowMap
    rows: Callable[[Tensor], Tensor]
    codebooks: list[Tensor]
    optimizer_state: list[Tensor]
    weights_V: Tensor | None
    chosen_ids: Tensor | None = None
    gradients: SumsById | None = None

    def decode(self, ids_N: Tensor) -> Tensor:
        """The vectors of some ids, all columns side by side: [N, C * D]."""
        pairs = zip(self.codebooks, self.rows(ids_N), strict=True)
        return torch.cat([codebook[rows_NR].sum(dim=1) for codebook, rows_NR in pairs], dim=1)


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


@dataclass(frozen=True)
class Vectors:
    """The column vectors to cluster: what ids decode to, or where they want to be."""

    state: TableState
    targets: Targets | None

    def __call__(self, column: int, ids_N: Tensor, rows_NR: Tensor) -> Tensor:
        """[N, D] of some ids, given the rows of the column that they add up."""
        codebook = self.state.codebooks[column]
        decoded_ND = codebook[rows_NR].sum(dim=1)
        if self.targets is None:
            return decoded_ND
        dim = codebook.shape[1]
        return self.targets(ids_N, decoded_ND, slice(column * dim, (column + 1) * dim))
