"""How often ids occur in training, counted on each rank, so that a re-clustering knows which of them are seen most."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.config import method_of
from cce_torchrec.lowering import Table
from cce_torchrec.sums_by_id import SumsById

_MOST_WAITING = 1 << 16


class CountsById:
    """How often each id was added. Memory grows with the different ids that were added, not with how many ids there are.

    Example:
        >>> counts = CountsById()
        >>> counts.add(torch.tensor([7, 42, 7]))
        >>> counts.sums().sums()
        (tensor([ 7, 42]), tensor([[2],
                [1]]))
    """

    def __init__(self) -> None:
        self._sums = SumsById(1, dtype=torch.int64)
        self._waiting: list[Tensor] = []

    def add(self, ids_N: Tensor) -> None:
        """Count some ids. They stay on their device until there are many: copying a few would hold up each step."""
        self._waiting.append(ids_N)
        if sum(map(len, self._waiting)) > _MOST_WAITING:
            self.sums()

    def sums(self) -> SumsById:
        """The counts, int64 [U, 1]; more may be added to them."""
        if self._waiting:
            ids_N = torch.cat(self._waiting)
            self._sums.add(ids_N, torch.ones(len(ids_N), 1, dtype=torch.int64))
            self._waiting = []
        return self._sums


class IdCounts:
    """What was counted on this rank for the tables of one collection whose methods ask for it.

    Args:
        tables: of the collection.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = [table for table in tables if method_of(table.config).counts_ids]
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.by_table = {table.name: CountsById() for table in self._tables}

    @torch.no_grad()
    def observe(self, features: KeyedJaggedTensor) -> None:
        """Count the ids of a batch. One out of bounds counts as id 0, which is looked up for it."""
        for table in self._tables:
            for feature in table.config.feature_names:
                ids_N = features[feature].values().long()
                is_inside_N = (ids_N >= 0) & (ids_N < table.config.num_embeddings)
                self.by_table[table.name].add(torch.where(is_inside_N, ids_N, 0))
