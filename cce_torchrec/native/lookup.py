"""Ids to pooled vectors by native kernels, in one operator: rows, sums, gradients and the optimizer's step.

    out[b, f] = sum_{n in bag (b, f)} w_n sum_{r in rows_i(id_n)} W_ti[r]        t: the table of feature f, i: a column
    g[row] = sum of w_n dL/dout over its occurrences;    m[row] += mean(g^2);    W_ti[row] -= lr g / (sqrt(m) + eps)

Parameters, optimizer state and settings stay those of PyTorch's or FBGEMM's own modules (see stores.py). Gradients add up in
buffers as large as the codebooks of one table, so a fused optimizer is for tables that are small beside a batch.

Shapes: N ids, F features, B bags of each, W the dims of the output.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cce_torchrec.methods.base import RowSource
from cce_torchrec.native.build import library, usable
from cce_torchrec.native.stores import Store


class _Piece(ctypes.Structure):
    """As ``Piece`` of lookup.cpp."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("first_out", ctypes.c_int64),
    ]


class _Table(ctypes.Structure):
    """As ``Table`` of lookup.cpp."""

    _fields_ = [
        ("assignments", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        *[
            (name, ctypes.c_int64)
            for name in (
                "bytes",
                "first_id",
                "num_ids",
                "columns",
                "stored",
                "level_rows",
                "hashes",
                "hashed_rows",
                "hashed_from",
                "hot_from",
                "first_feature",
                "num_features",
                "first_piece",
                "num_pieces",
            )
        ],
    ]


class _Tables(ctypes.Structure):
    """As ``Tables`` of lookup.cpp."""

    _fields_ = [("tables", ctypes.c_void_p), ("pieces", ctypes.c_void_p), ("num_tables", ctypes.c_int64)]


class _Batch(ctypes.Structure):
    """As ``Batch`` of lookup.cpp."""

    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sample_weights", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    """As ``Step`` of lookup.cpp."""

    _fields_ = [("gradient", ctypes.c_void_p), ("learning_rate", ctypes.c_float), ("eps", ctypes.c_float)]


class HasSource(Protocol):
    """A row map, or what stands for one."""

    def source(self) -> RowSource | None:
        """Where the rows of ids are."""


@dataclass(frozen=True)
class Piece:
    """A column of a table, or some dims of it, as one of the tensors of a store.

    Attributes:
        weight: its number in the store.
        column: of the table.
        outs: where its vectors begin in a row of the output, for each feature of the table.
    """

    weight: int
    column: int
    outs: tuple[int, ...]


@dataclass(frozen=True)
class LookupTable:
    """What one table is made of.

    Attributes:
        row_map: says where its rows are, for every batch anew.
        first_feature: the first of its features in the batch; the others follow.
        pieces: at least one.
    """

    row_map: HasSource
    first_feature: int
    pieces: tuple[Piece, ...]

    @property
    def num_features(self) -> int:
        """Of the batch."""
        return len(self.pieces[0].outs)


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
        self._cached: _Addresses | None = None

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
        if keeps and self.store.steps and cached.num_rows > 2 * num_kept:
            return None
        out: Tensor | None = _Lookup.apply(self, batch, num_kept if keeps else None, *inputs)
        return out

    def _refreshed(self) -> "_Addresses | None":
        """Where everything is now; ``None`` where that is not where the kernels can look."""
        sources = [table.row_map.source() for table in self._tables]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            return None
        made_of = (
            self.store.addresses(),
            [(_address(s.assignments), _address(s.coefficients), s.num_ids, s.hot_from) for s in known],
        )
        if self._cached is None or self._cached.made_of != made_of:
            self._cached = _addresses(self._tables, known, self.store, made_of)
        return self._cached if self._cached.is_plain else None

    def c_tables(self) -> Any:
        """A reference to the tables as C structures."""
        assert self._cached is not None
        return ctypes.byref(self._cached.tables)

    def c_batch(self, batch: _Given) -> _Batch:
        """A batch as a C structure; the tensors must outlive it."""
        ids_N, offsets, sample_weights_N = batch
        size = (len(offsets) - 1) // self._num_features
        return _Batch(
            ids_N.data_ptr(),
            offsets.data_ptr(),
            _address(sample_weights_N),
            self._outs.data_ptr(),
            size,
            self._width,
        )


@dataclass(frozen=True)
class _Addresses:
    """Tables and their weights as C structures.

    Attributes:
        made_of: what they are valid for.
        keeps: what the structures point to.
        rows_per_id_T: in all pieces of a table together.
        num_rows: of all pieces.
        is_plain: whether all weights are such that kernels can look them up.
    """

    made_of: tuple[Any, ...]
    tables: _Tables
    keeps: tuple[Any, ...]
    rows_per_id_T: Tensor
    num_rows: int
    is_plain: bool


def _addresses(
    tables: Sequence[LookupTable], sources: Sequence[RowSource], store: Store, made_of: tuple[Any, ...]
) -> _Addresses:
    weights, momenta = store.weights(), store.momenta()
    starts = list(itertools.accumulate((weight.numel() for weight in weights), initial=0))
    pieces: list[_Piece] = []
    made: list[_Table] = []
    first_out = 0
    for table, source in zip(tables, sources, strict=True):
        made.append(_table(table, source, first_piece=len(pieces)))
        for piece in table.pieces:
            weight = weights[piece.weight]
            momentum = _address(momenta[piece.weight])
            pieces.append(
                _Piece(weight.data_ptr(), momentum, starts[piece.weight], *weight.shape, piece.column, first_out)
            )
            first_out += len(piece.outs)
    c_tables, c_pieces = (_Table * len(made))(*made), (_Piece * len(pieces))(*pieces)
    return _Addresses(
        made_of=made_of,
        tables=_Tables(ctypes.addressof(c_tables), ctypes.addressof(c_pieces), len(made)),
        keeps=(c_tables, c_pieces),
        rows_per_id_T=torch.tensor([table.num_pieces * max(table.stored + table.hashes, 1) for table in made]),
        num_rows=sum(piece.rows for piece in pieces),
        is_plain=all(weight.dtype == torch.float32 and _is_reachable(weight) for weight in weights)
        and all(_is_reachable(source.assignments) and _is_reachable(source.coefficients) for source in sources),
    )


def _is_reachable(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_cpu and tensor.is_contiguous())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _table(table: LookupTable, source: RowSource, first_piece: int) -> _Table:
    words = source.assignments
    return _Table(
        assignments=_address(words),
        coefficients=_address(source.coefficients),
        bytes=0 if words is None else words.element_size(),
        first_id=source.first_id,
        num_ids=source.num_ids,
        columns=1 if words is None or source.num_stored == 0 else words.shape[1] // source.num_stored,
        stored=source.num_stored,
        level_rows=source.level_rows,
        hashes=source.num_hashes,
        hashed_rows=source.num_hashed_rows,
        hashed_from=source.hashed_from,
        hot_from=-1 if source.hot_from is None else source.hot_from,
        first_feature=table.first_feature,
        num_features=table.num_features,
        first_piece=first_piece,
        num_pieces=len(table.pieces),
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
            lookup.c_tables(), ctypes.byref(c_batch), _address(kept), out.data_ptr(), torch.get_num_threads()
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
        step, c_batch = _Step(_address(flat), *store.settings()), lookup.c_batch(ctx.batch)
        loaded.cce_lookup_backward(
            lookup.c_tables(),
            ctypes.byref(c_batch),
            ctx.kept.data_ptr(),
            gradient.data_ptr(),
            ctypes.byref(step),
            torch.get_num_threads(),
        )
        return None, None, None, *store.gradients(flat)
