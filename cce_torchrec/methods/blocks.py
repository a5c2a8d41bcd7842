"""Blocks of consecutive ids that share a row: what a hash does not see, neighbours that are alike, they make use of.

    b_i(v) = floor((k v + floor(i V / A)) / V) mod k,    i < A

The A assignments of an id are each of another split, moved by a part of a block, so that neighbours share most of them, and
ids that are further apart than a block is long share none. Where ids are numbered at random, that is a hash that gives every
row as many ids.

Shapes: V ids, N ids of a batch, A assignments an id, k blocks.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from cce_torchrec.methods.base import Column, RowMap

Assignments = Literal["blocks", "hash"]


def check_assignments(**values: str) -> None:
    """Raise a ``ValueError`` for every value that is no way to assign ids to rows."""
    for name, value in values.items():
        if value not in get_args(Assignments):
            raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(Assignments))}.")


def check_blocks(num_ids: int, num_blocks: int) -> None:
    """Raise a ``ValueError`` where there are more ids and blocks than 64-bit arithmetic takes."""
    if num_ids * num_blocks + num_ids >= 2**63:
        raise ValueError(
            f"{num_ids} ids in {num_blocks} blocks are too many for 64-bit integers: hash them, or take fewer."
        )


def blocks_of_ids(ids_N: Tensor, num_ids: int, num_blocks: int, count: int) -> Tensor:
    """Blocks of consecutive ids, of each of ``count`` assignments another split: int64 [A, N].

    Args:
        ids_N: v, int64 in [0, V).
        num_ids: V.
        num_blocks: k.
        count: A.

    Raises:
        ValueError: where k V is more than 64 bits hold.

    Example:
        >>> blocks_of_ids(torch.arange(6), 6, 3, 2)
        tensor([[0, 0, 1, 1, 2, 2],
                [0, 1, 1, 2, 2, 0]])
    """
    check_blocks(num_ids, num_blocks)
    shift_A1 = torch.arange(count, device=ids_N.device)[:, None] * num_ids // count
    return (ids_N * num_blocks + shift_A1) // num_ids % num_blocks


class BlockRowMap(RowMap):
    """One row in every column, that of the id's block there; nothing is stored."""

    bounded = True

    def __init__(self, columns: tuple[Column, ...], num_embeddings: int) -> None:
        super().__init__()
        check_blocks(num_embeddings, columns[0].num_rows)
        self.columns, self._num_embeddings = columns, num_embeddings

    def rows(self, ids_N: Tensor) -> Tensor:
        return blocks_of_ids(ids_N, self._num_embeddings, self.columns[0].num_rows, len(self.columns)).unsqueeze(-1)
