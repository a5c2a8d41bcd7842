"""Ids to pooled vectors by native kernels, in one operator: rows, sums, gradients and the optimizer's step.

    out[b, f] = sum_{n in bag (b, f)} w_n sum_{r in rows_i(id_n)} W_ti[r]        t: the table of feature f, i: a column
    g[row] = sum of w_n dL/dout over its occurrences;    m[row] += mean(g^2);    W_ti[row] -= lr g / (sqrt(m) + eps)

Parameters, optimizer state and settings stay those of PyTorch's or FBGEMM's own modules (see stores.py). A fused optimizer's
step takes time and memory that grow with the rows that the batch looks up, however many rows the codebooks have.

Shapes: N ids, F features, B bags of each, W the dims of the output.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce_torchrec.native.build import library, usable
from cce_torchrec.native.lookup_tables import Addresses, CBatch, CStep, LookupTable, Piece, address, addresses
from cce_torchrec.native.stores import Store

__all__ = ["FusedLookup", "LookupTable", "Piece"]

_Given = tuple[Tensor, Tensor, Tensor | None]  # ids, offsets, sample weights


class FusedLookup:
    """The operator for some tables.

    Args:
        tables: what is looked up; at least one.
        num_features: F, of a batch, those of other tables included.
        width: W, of the output.
        store: weights, and how they are trained.
    """

    def __init__(self, tables: Sequence[LookupTable], num_features: int, width: int, store: Store) -> None:
        self._tables, self._num_features, self._width, self.store = tables, num_features, width, store
        outs = [out for table in tables for piece in table.pieces for out in piece.outs]
        self._outs = torch.tensor(outs, dtype=torch.int64)
        self._places = torch.tensor([[t.first_feature, t.first_feature + t.num_features] for t in tables])
        self._cached: Addresses | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __call__(self, ids_N: Tensor, offsets: Tensor, sample_weights_N: Tensor | None) -> Tensor | None:
        """Pooled vectors.

        Args:
            ids_N: of all features, one feature after the other.
            offsets: [F * B + 1], of the bags.
            sample_weights_N: of the ids, if any; no gradients flow to them.

        Returns:
            float32 [B, W]; ``None``, and nothing done, where an id is out of bounds or the kernels are made for other things.
        """
        if usable(ids_N.contiguous(), offsets.contiguous()) is None:
            return None
        cached = self._refreshed()
        if cached is None:
            return None
        batch = (
            ids_N.to(torch.int64).contiguous(),
            offsets.to(torch.int64).contiguous(),
            None if sample_weights_N is None else sample_weights_N.detach().float().contiguous(),
        )
        ends_T2 = batch[1][self._places * ((len(offsets) - 1) // self._num_features)]
        num_kept = int(((ends_T2[:, 1] - ends_T2[:, 0]) * cached.rows_per_id_T).sum())
        inputs = self.store.inputs()
        keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        out: Tensor | None = _Lookup.apply(self, batch, num_kept if keeps else None, *inputs)
        return out

    def _refreshed(self) -> Addresses | None:
        """Where everything is now; ``None`` where that is not where the kernels can look."""
        sources = [table.row_map.source() for table in self._tables]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            return None
        made_of = (
            self.store.addresses(),
            [(address(s.assignments), address(s.coefficients), s.num_ids, s.hot_from) for s in known],
        )
        if self._cached is None or self._cached.made_of != made_of:
            self._cached = addresses(self._tables, known, self.store, made_of)
        return self._cached if self._cached.is_plain else None

    def c_tables(self) -> Any:
        """A reference to the tables as C structures."""
        assert self._cached is not None
        return ctypes.byref(self._cached.tables)

    def c_batch(self, batch: _Given) -> CBatch:
        """A batch as a C structure; the tensors must outlive it."""
        ids_N, offsets, sample_weights_N = batch
        size = (len(offsets) - 1) // self._num_features
        return CBatch(
            ids_N.data_ptr(),
            offsets.data_ptr(),
            address(sample_weights_N),
            self._outs.data_ptr(),
            size,
            self._width,
        )


class _Lookup(torch.autograd.Function):
    """The kernels as a function that autograd knows."""

    @staticmethod
    def forward(ctx: Any, lookup: FusedLookup, batch: _Given, num_kept: int | None, *inputs: Tensor) -> Tensor | None:
        """Pooled vectors, or ``None`` where an id is out of bounds; ``num_kept``: how many rows a backward needs, if any."""
        loaded = library()
        assert loaded is not None
        c_batch = lookup.c_batch(batch)
        out = torch.empty(c_batch.size, c_batch.width)
        kept = None if num_kept is None else torch.empty(num_kept, dtype=torch.int32)
        ctx.lookup, ctx.batch, ctx.kept = lookup, batch, kept
        fine = loaded.cce_lookup(
            lookup.c_tables(), ctypes.byref(c_batch), address(kept), out.data_ptr(), torch.get_num_threads()
        )
        return out if fine else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Step the optimizer, or return dense gradients."""
        loaded = library()
        assert loaded is not None
        lookup, store = ctx.lookup, ctx.lookup.store
        gradient = gradients[0].float().contiguous()
        flat = None if store.steps else torch.zeros(sum(weight.numel() for weight in store.weights()))
        step, c_batch = CStep(address(flat), *store.settings()), lookup.c_batch(ctx.batch)
        loaded.cce_lookup_backward(
            lookup.c_tables(),
            ctypes.byref(c_batch),
            ctx.kept.data_ptr(),
            gradient.data_ptr(),
            ctypes.byref(step),
            torch.get_num_threads(),
        )
        return None, None, None, *store.gradients(flat)
