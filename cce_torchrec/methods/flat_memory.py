"""One flat, circular memory that vectors are read from in windows; what ROBE, HashedNets and CCE on such memory share.

    window(o) = ( memory[(o + z) mod M] ),  z = 0 .. Z - 1

Shapes: M cells, N ids, B windows an id, Z cells a window, D dims.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cce_torchrec.hashing import MAX_ROWS, hash_coefficients, hash_rows
from cce_torchrec.methods.base import Decoder, TableSpec, check_positive

MAX_CELLS = MAX_ROWS // 2  # a hash tells the cell and the sign


class _Windows(torch.autograd.Function):
    """Gathers windows; the backward adds up in at least float32 and rounds once, and keeps nothing but the offsets.

    The memory is copied with its beginning repeated behind its end, so that windows are rows of a strided view and no
    index is computed for an element: over ten times faster than one index an element.
    """

    @staticmethod
    def forward(ctx: Any, memory_M: Tensor, offsets_W: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(offsets_W)
        ctx.num_cells, ctx.width, ctx.dtype = len(memory_M), width, memory_M.dtype
        unrolled = torch.cat([memory_M, memory_M[: width - 1]])
        windows_WZ = unrolled.as_strided((len(memory_M), width), (1, 1)).index_select(0, offsets_W)
        return windows_WZ.to(torch.promote_types(memory_M.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (offsets_W,), (grad_WZ,) = ctx.saved_tensors, grads
        cells_WZ = offsets_W[:, None] + torch.arange(ctx.width, dtype=offsets_W.dtype, device=offsets_W.device)
        unrolled = grad_WZ.new_zeros(ctx.num_cells + ctx.width - 1)
        unrolled.index_add_(0, cells_WZ.view(-1), grad_WZ.reshape(-1))
        sums_M = unrolled[: ctx.num_cells]
        sums_M[: ctx.width - 1] += unrolled[ctx.num_cells :]
        return sums_M.to(ctx.dtype), None, None


def read_windows(memory_M: Tensor, offsets_NB: Tensor, width: int) -> Tensor:
    """Windows of a circular memory.

        out[n, b, z] = memory[(offsets[n, b] + z) mod M]

    Args:
        memory_M: the memory, [M] of a floating dtype.
        offsets_NB: where windows start, integers [N, B] in [0, M); N may be 0.
        width: Z, at most M.

    Returns:
        [N, B, Z], float32 for memories in half precision. Its gradient is added up in that type.

    Example:
        >>> read_windows(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([[3, 1]]), 2)
        tensor([[[3., 0.],
                 [1., 2.]]])
    """
    offsets_W = offsets_NB.to(torch.int32).reshape(-1)
    windows_WZ: Tensor = _Windows.apply(memory_M, offsets_W, width)
    return windows_WZ.view(*offsets_NB.shape, width)


def new_memory(num_cells: int, table: TableSpec) -> nn.Parameter:
    """The memory of a table, not filled yet."""
    return nn.Parameter(torch.empty(num_cells, dtype=table.dtype, device=table.device))


@torch.no_grad()
def fill_memory(memory_M: Tensor, std: float) -> None:
    """Draw the cells uniformly, with mean 0 and standard deviation ``std``."""
    memory_M.uniform_(-std * 3**0.5, std * 3**0.5)


class BlockDecoder(Decoder):
    """A vector as ceil(D / Z) hashed blocks of Z dims, the last one cut short where Z does not divide D.

    Parameter: ``memory`` [M]. Buffer: ``coefficients`` int64 [1 + blocks]; a hash in [0, 2M) is the offset and the sign.

    Args:
        table: what to stand for.
        num_cells: M.
        block_size: Z, at most M and D.
        signed: whether each block is multiplied by a hashed sign.
        key: what the hashes are a function of.
    """

    coefficients: Tensor

    def __init__(
        self, table: TableSpec, *, num_cells: int, block_size: int, signed: bool, key: tuple[object, ...]
    ) -> None:
        super().__init__()
        self._block_size, self._signed = block_size, signed
        self._embedding_dim, self._std, self._key = table.embedding_dim, table.std, key
        self._num_blocks = -(-table.embedding_dim // block_size)
        self.memory = new_memory(num_cells, table)
        empty = torch.empty(1 + self._num_blocks, dtype=torch.int64, device=table.device)
        self.register_buffer("coefficients", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.coefficients.copy_(hash_coefficients(self._num_blocks, *self._key))
        fill_memory(self.memory, self._std)

    def forward(self, ids_N: Tensor) -> Tensor:
        hashes_BN = hash_rows(ids_N, self.coefficients, 2 * len(self.memory)).to(torch.int32)
        hashes_NB = hashes_BN.T.contiguous()
        blocks_NBZ = read_windows(self.memory, hashes_NB >> 1, self._block_size)
        if self._signed:
            blocks_NBZ = blocks_NBZ * (1 - 2 * (hashes_NB & 1)).unsqueeze(2)
        return blocks_NBZ.flatten(1)[:, : self._embedding_dim]


def check_cells(**values: int) -> None:
    """Raise a ``ValueError`` for every number of cells that no hash can map to."""
    check_positive(**values)
    for name, value in values.items():
        if value > MAX_CELLS:
            raise ValueError(f"{name}={value} is above {MAX_CELLS}, the most cells a hash can map to.")


def check_window(width: int, **values: int) -> None:
    """Raise a ``ValueError`` for every number of cells that does not hold a window."""
    for name, value in values.items():
        if value < width:
            raise ValueError(
                f"{name}={value} is smaller than a window of {width} cells, which would overlap itself; "
                f"the nearest number that works is {width}, else make the windows narrower."
            )


def budget_cells(method: str, num_params: int, smallest: int) -> int:
    """How many cells a budget pays for; a ``ValueError`` naming the smallest budget if under ``smallest``."""
    if num_params < smallest:
        raise ValueError(
            f"{method}: a budget of {num_params} parameters is too small; the smallest possible is {smallest}."
        )
    return min(num_params, MAX_CELLS)
