"""Ids to rows by the native kernels, written straight to where they are looked up.

Shapes: N ids, C columns, R rows an id and column.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_torchrec.native.build import usable

_SCRATCH_IDS = 512  # as BLOCK of rows.cpp
_NONE_HOT = 2**62  # above any row


def write_hashed_rows(
    ids_N: Tensor, coefficients: Tensor, num_rows: int, values_M: Tensor, starts_C: Sequence[int | None]
) -> bool:
    """Write what :func:`cce_torchrec.hashing.hash_rows` returns for each column to its place in ``values_M``.

    Args:
        ids_N: any ids.
        coefficients: int64 [1 + C], of the hash functions.
        num_rows: the range of the hashes.
        values_M: int64 [M], where to write.
        starts_C: where in it the N rows of each column begin; ``None`` leaves the column out.

    Returns:
        Whether it was done: not where there is no library, or for tensors it cannot see into.
    """
    ids_N = ids_N.to(torch.int64).contiguous()
    loaded = usable(ids_N, coefficients)
    if loaded is None:
        return False
    loaded.cce_hashed_rows(
        ids_N.data_ptr(), len(ids_N), len(starts_C), coefficients.data_ptr(), num_rows, _addresses(values_M, starts_C)
    )
    return True


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """Stored assignments of C columns.

    Attributes:
        assignments: integers [ids, C] of type uint8, int16 or int32; or bytes [ids, B] of bits, uint8.
        bits: of an assignment; 0 where they are integers.
        columns: C.
        first_id: the first of the ids that may be asked for.
        num_ids: how many in a row may be.
        warm_ids: int32 or int64, sorted: whose assignments are stored, where these are not all ids in a row.
        coefficients: int64 [1 + C], of the hash of the other ids.
        num_values: the range of that hash.
    """

    assignments: Tensor
    bits: int
    columns: int
    first_id: int
    num_ids: int
    warm_ids: Tensor | None
    coefficients: Tensor | None
    num_values: int

    def tensors(self) -> list[Tensor]:
        """All there are."""
        return [tensor for tensor in (self.assignments, self.warm_ids, self.coefficients) if tensor is not None]


class _Stored(ctypes.Structure):
    """As Stored of rows.cpp."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("word_bytes", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("warm", ctypes.c_void_p),
        ("warm_bytes", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("coefficients", ctypes.c_void_p),
        ("num_values", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, assigned: Assigned) -> "_Stored":
        """Addresses, which live as long as the tensors."""
        rows, warm, coefficients = assigned.assignments, assigned.warm_ids, assigned.coefficients
        return cls(
            rows=rows.data_ptr(),
            word_bytes=rows.element_size(),
            bits=assigned.bits,
            row_bytes=rows.shape[1],
            num_rows=len(rows),
            columns=assigned.columns,
            first=assigned.first_id,
            count=assigned.num_ids,
            warm=None if warm is None else warm.data_ptr(),
            warm_bytes=0 if warm is None else warm.element_size(),
            slots=0 if warm is None else len(warm),
            coefficients=None if coefficients is None else coefficients.data_ptr(),
            num_values=assigned.num_values,
        )


def write_assigned_rows(
    ids_N: Tensor,
    assigned: Assigned,
    coefficients: Tensor,
    num_hashed_rows: int,
    values_M: Tensor,
    starts_C: Sequence[int | None],
    *,
    hashed_from: int,
    hot_from: int | None = None,
) -> bool:
    """Write a stored and a hashed row of each id, in turn, for each column to its place in ``values_M``.

    Args:
        ids_N: any ids.
        assigned: their assignments.
        coefficients: int64 [1 + C], of the hash functions.
        num_hashed_rows: the range of the hashes.
        values_M: int64 [M], where to write.
        starts_C: where in it the 2 N rows of each column begin; ``None`` leaves the column out.
        hashed_from: what is added to the hashes.
        hot_from: assignments from here on are both rows of their id.

    Returns:
        Whether it was done: not where an id may not be asked for, there is no library, or for tensors it cannot see into.
    """
    ids_N = ids_N.to(torch.int64).contiguous()
    loaded = usable(ids_N, coefficients, *assigned.tensors())
    if loaded is None:
        return False
    scratch = torch.empty(len(starts_C) * _SCRATCH_IDS, dtype=torch.int32)
    return bool(
        loaded.cce_assigned_rows(
            ids_N.data_ptr(),
            len(ids_N),
            ctypes.byref(_Stored.of(assigned)),
            coefficients.data_ptr(),
            num_hashed_rows,
            hashed_from,
            _NONE_HOT if hot_from is None else hot_from,
            scratch.data_ptr(),
            _addresses(values_M, starts_C),
        )
    )


def _addresses(values_M: Tensor, starts_C: Sequence[int | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Where each column is written to, as a C array of pointers."""
    address, size = values_M.data_ptr(), values_M.element_size()
    return (ctypes.c_void_p * len(starts_C))(*[None if start is None else address + size * start for start in starts_C])
