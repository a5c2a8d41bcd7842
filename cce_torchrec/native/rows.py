"""Ids to rows by the native kernels, written straight to where they are looked up.

Shapes: N ids, C columns, R rows an id and column.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cce_torchrec.native.build import usable

_SCRATCH_IDS = 512  # as BLOCK of rows.cpp


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


def write_assigned_rows(
    ids_N: Tensor,
    assignments: Tensor,
    first_id: int,
    coefficients: Tensor,
    num_hashed_rows: int,
    values_M: Tensor,
    starts_C: Sequence[int | None],
    *,
    hashed_from: int,
) -> bool:
    """Write a stored and a hashed row of each id, in turn, for each column to its place in ``values_M``.

    Args:
        ids_N: any ids.
        assignments: uint8, int16 or int32 [ids, C], of ids ``first_id`` and following.
        first_id: the id of the first assignment.
        coefficients: int64 [1 + C], of the hash functions.
        num_hashed_rows: the range of the hashes.
        values_M: int64 [M], where to write.
        starts_C: where in it the 2 N rows of each column begin; ``None`` leaves the column out.
        hashed_from: what is added to the hashes.

    Returns:
        Whether it was done: not where an id has no assignment, there is no library, or for tensors it cannot see into.
    """
    ids_N = ids_N.to(torch.int64).contiguous()
    loaded = usable(ids_N, coefficients, assignments)
    if loaded is None:
        return False
    scratch = torch.empty(len(starts_C) * _SCRATCH_IDS, dtype=assignments.dtype)
    return bool(
        loaded.cce_assigned_rows(
            ids_N.data_ptr(),
            len(ids_N),
            assignments.data_ptr(),
            assignments.element_size(),
            first_id,
            len(assignments),
            len(starts_C),
            coefficients.data_ptr(),
            num_hashed_rows,
            hashed_from,
            scratch.data_ptr(),
            _addresses(values_M, starts_C),
        )
    )


def _addresses(values_M: Tensor, starts_C: Sequence[int | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Where each column is written to, as a C array of pointers."""
    address, size = values_M.data_ptr(), values_M.element_size()
    return (ctypes.c_void_p * len(starts_C))(*[None if start is None else address + size * start for start in starts_C])
