"""FBGEMM's table-batched embeddings with a native forward, for rows that were computed elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cce_torchrec.methods.base import RowSource
from cce_torchrec.native.build import library
from cce_torchrec.native.lookup import FusedLookup, LookupTable, Piece
from cce_torchrec.native.stores import features_of_tables, store_of


@dataclass(frozen=True)
class _Rows:
    """The identity: ids are rows."""

    num_rows: int

    def source(self) -> RowSource:
        return RowSource(num_ids=self.num_rows)


def use_native_lookups(module: nn.Module) -> int:
    """Give FBGEMM's table-batched embeddings inside ``module`` a native forward, where they are on the CPU and plain.

    Returns:
        How many there were.
    """
    if library() is None:
        return 0
    found = 0
    for part in module.modules():
        lookup = _lookup(part)
        if lookup is not None:
            part.forward = NativeForward(lookup, part.forward)
            found += 1
    return found


def _lookup(tbe: Any) -> FusedLookup | None:
    store = store_of(tbe)
    if store is None or not all(weight.is_cpu for weight in store.weights()):
        return None
    columns_F = tbe.D_offsets.tolist()
    tables = [
        LookupTable(_Rows(len(weight)), first, (Piece(number, 0, tuple(columns_F[first : first + count])),))
        for number, (weight, (first, count)) in enumerate(zip(store.weights(), features_of_tables(tbe), strict=True))
        if count
    ]
    return FusedLookup(tables, len(columns_F) - 1, columns_F[-1], store)


class NativeForward:
    """A forward of one of FBGEMM's modules.

    Args:
        lookup: the operator over its tables.
        fallback: FBGEMM's own forward, for what is not done here.
    """

    def __init__(self, lookup: FusedLookup, fallback: Callable[..., Tensor]) -> None:
        self._lookup, self._fallback = lookup, fallback

    def __call__(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Pooled vectors [B, W], as FBGEMM's."""
        weighs = per_sample_weights is not None and per_sample_weights.requires_grad
        if not weighs and not any(value is not None for value in others.values()):
            out = self._lookup(indices, offsets, per_sample_weights)
            if out is not None:
                return out
        return self._fallback(indices, offsets, per_sample_weights, **others)
