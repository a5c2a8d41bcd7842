"""Numbers added up by id in host memory, such as gradients and counts.

Shapes: N ids that are added, U different ids, W numbers a row.
"""

import torch
from torch import Tensor

_LEAST_PENDING = 1 << 16


class SumsById:
    """Rows added up by id. Memory grows with the different ids that were added, not with how many ids there are.

    Args:
        width: numbers a row.
        max_ids: where more ids come, those are kept whose sum has the largest last number; ``None`` keeps all.
        dtype: of the numbers.
    """

    def __init__(self, width: int, max_ids: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        self._max_ids = max_ids
        self._merged = (torch.empty(0, dtype=torch.int64), torch.empty(0, width, dtype=dtype))
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._num_pending = 0

    def empty_copy(self) -> "SumsById":
        """One for rows of the same width and type, of any number of ids."""
        rows_UW = self._merged[1]
        return SumsById(rows_UW.shape[1], dtype=rows_UW.dtype)

    def snapshot(self) -> "SumsById":
        """These sums as they are now, to be read elsewhere while more is added to these."""
        copied = self.empty_copy()
        copied._merged, copied._pending, copied._num_pending = self._merged, list(self._pending), self._num_pending
        return copied

    def add(self, ids_N: Tensor, rows_NW: Tensor) -> None:
        """Add rows to the sums of their ids."""
        self._pending.append((ids_N.cpu(), rows_NW.cpu()))
        self._num_pending += len(ids_N)
        if self._num_pending > max(_LEAST_PENDING, len(self._merged[0])):
            self.sums()

    def sums(self) -> tuple[Tensor, Tensor]:
        """The ids in rising order, int64 [U], and their sums, [U, W]; on the CPU."""
        if self._pending:
            ids, rows = zip(self._merged, *self._pending, strict=True)
            ids_U, place_N = torch.unique(torch.cat(ids), return_inverse=True)
            sums_UW = rows[0].new_zeros(len(ids_U), rows[0].shape[1]).index_add_(0, place_N, torch.cat(rows))
            if self._max_ids is not None and len(ids_U) > self._max_ids:
                kept_U = sums_UW[:, -1].topk(self._max_ids).indices.sort().values
                ids_U, sums_UW = ids_U[kept_U], sums_UW[kept_U]
            self._merged = ids_U, sums_UW
            self._pending, self._num_pending = [], 0
        return self._merged
