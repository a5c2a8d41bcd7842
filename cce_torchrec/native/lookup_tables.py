"""What the native lookup is given: tables, their pieces and batches, as users write them and as C structures."""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cce_torchrec.methods.base import RowSource
from cce_torchrec.native.stores import Store


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


class CPiece(ctypes.Structure):
    """As ``Piece`` of lookup_tables.h."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("first_out", ctypes.c_int64),
    ]


class CTable(ctypes.Structure):
    """As ``Table`` of lookup_tables.h."""

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


class CTables(ctypes.Structure):
    """As ``Tables`` of lookup_tables.h."""

    _fields_ = [("tables", ctypes.c_void_p), ("pieces", ctypes.c_void_p), ("num_tables", ctypes.c_int64)]


class CBatch(ctypes.Structure):
    """As ``Batch`` of lookup_tables.h."""

    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sample_weights", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class CStep(ctypes.Structure):
    """As ``Step`` of lookup_tables.h."""

    _fields_ = [("gradient", ctypes.c_void_p), ("learning_rate", ctypes.c_float), ("eps", ctypes.c_float)]


@dataclass(frozen=True)
class Addresses:
    """Tables and their weights as C structures.

    Attributes:
        made_of: what they are valid for.
        keeps: what the structures point to.
        rows_per_id_T: in all pieces of a table together.
        is_plain: whether all weights are such that kernels can look them up.
    """

    made_of: tuple[Any, ...]
    tables: CTables
    keeps: tuple[Any, ...]
    rows_per_id_T: Tensor
    is_plain: bool


def addresses(
    tables: Sequence[LookupTable], sources: Sequence[RowSource], store: Store, made_of: tuple[Any, ...]
) -> Addresses:
    """Everything where it is now."""
    weights, momenta = store.weights(), store.momenta()
    starts = list(itertools.accumulate((weight.numel() for weight in weights), initial=0))
    pieces: list[CPiece] = []
    made: list[CTable] = []
    first_out = 0
    for table, source in zip(tables, sources, strict=True):
        made.append(_table(table, source, first_piece=len(pieces)))
        for piece in table.pieces:
            weight = weights[piece.weight]
            momentum = address(momenta[piece.weight])
            pieces.append(
                CPiece(weight.data_ptr(), momentum, starts[piece.weight], *weight.shape, piece.column, first_out)
            )
            first_out += len(piece.outs)
    c_tables, c_pieces = (CTable * len(made))(*made), (CPiece * len(pieces))(*pieces)
    return Addresses(
        made_of=made_of,
        tables=CTables(ctypes.addressof(c_tables), ctypes.addressof(c_pieces), len(made)),
        keeps=(c_tables, c_pieces),
        rows_per_id_T=torch.tensor([table.num_pieces * max(table.stored + table.hashes, 1) for table in made]),
        is_plain=all(weight.dtype == torch.float32 and _is_reachable(weight) for weight in weights)
        and all(_is_reachable(source.assignments) and _is_reachable(source.coefficients) for source in sources),
    )


def _is_reachable(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_cpu and tensor.is_contiguous())


def address(tensor: Tensor | None) -> int | None:
    """Of the first number, if any."""
    return None if tensor is None else tensor.data_ptr()


def _table(table: LookupTable, source: RowSource, first_piece: int) -> CTable:
    words = source.assignments
    return CTable(
        assignments=address(words),
        coefficients=address(source.coefficients),
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
