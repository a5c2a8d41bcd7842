"""Ids to pooled vectors by Triton kernels, and dense gradients of the codebooks back.

    out[b, f] = sum_{n in bag (b, f)} w_n sum_{r in rows_i(id_n)} W_ti[r]        t: the table of feature f, i: a column
    dL/dW_ti[r] = sum of w_n dL/dout[b, f] over the occurrences of r             in float32, by atomic additions

What ``native.lookup`` does on a CPU, for weights that autograd trains; those that FBGEMM trains in its backward are left to
it. Parameters stay those of PyTorch's or FBGEMM's own modules (see native/stores.py). Nothing waits for the device: an id
out of bounds is looked up as the first one, and where the mode is FATAL a device-side assertion fails.

Shapes: N ids, F features, B bags of each, W the dims of the output.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from cce_torchrec.bounds import FATAL
from cce_torchrec.gpu.dispatch import takes
from cce_torchrec.gpu.lookup_kernels import JOB_WORDS, lookup_backward_kernel, lookup_kernel
from cce_torchrec.methods.base import RowSource
from cce_torchrec.native.lookup import LookupTable
from cce_torchrec.native.stores import Store

TILE = 2048  # numbers of the output that a program works on
MOST_BAGS = 256  # of a program

_WORDS = {torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32}
_Given = tuple[Tensor, Tensor, Tensor | None]  # ids, offsets, sample weights


@dataclass(frozen=True)
class _Kind:
    """What the compiler knows of a job: dims and rows of its column, the assignments' type, and how vectors lie."""

    dim: int
    num_stored: int
    num_hashes: int
    has_hot: bool
    dtype: torch.dtype | None
    aligned: int  # numbers of which any place of a vector is a multiple; 4 are moved at once

    def constants(self) -> dict[str, Any]:
        block = triton.next_power_of_2(self.dim)
        return {
            "DIM": self.dim,
            "ROWS": max(self.num_stored + self.num_hashes, 1),
            "STORED": self.num_stored,
            "HASHES": self.num_hashes,
            "HOT": self.has_hot,
            "WORD": tl.int32 if self.dtype is None else _WORDS[self.dtype],
            "BLOCK_B": min(max(TILE // block, 1), MOST_BAGS),
            "BLOCK_D": block,
            "ALIGNED": self.aligned,
        }


@dataclass(frozen=True)
class _Jobs:
    """The jobs of all tables on their device.

    Attributes:
        made_of: the addresses they are valid for.
        device: of everything.
        of_kinds: int64 [jobs, JOB_WORDS] of each kind.
        sources: tensors that they point to, besides the weights.
        is_plain: whether all weights are such that the kernels can look them up.
        is_bounded: whether there are ids that cannot be looked up.
    """

    made_of: tuple[Any, ...]
    device: torch.device
    of_kinds: dict[_Kind, Tensor]
    sources: tuple[Tensor, ...]
    is_plain: bool
    is_bounded: bool


class TritonLookup:
    """The kernels for some tables; arguments as those of ``Lookup``."""

    def __init__(
        self, tables: Sequence[LookupTable], num_features: int, width: int, store: Store, mode: BoundsCheckMode
    ) -> None:
        self._tables, self.num_features, self.width, self.store = tables, num_features, width, store
        self.asserts = mode in FATAL
        self._cached: _Jobs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __call__(self, ids_N: Tensor, offsets: Tensor, sample_weights_N: Tensor | None) -> Tensor | None:
        """Pooled vectors; ``None``, and nothing done, where the kernels are made for other things."""
        if self.store.steps or torch.are_deterministic_algorithms_enabled():
            return None
        jobs = self._refreshed()
        if jobs is None or not jobs.is_plain or not jobs.device == ids_N.device == offsets.device:
            return None
        weights_N = None if sample_weights_N is None else sample_weights_N.detach().float().contiguous()
        batch = ids_N.contiguous(), offsets.contiguous(), weights_N
        out: Tensor = _Lookup.apply(self, batch, jobs, *self.store.inputs())
        return out

    def _refreshed(self) -> _Jobs | None:
        """Where everything is now; ``None`` where a table has no source."""
        sources = [table.row_map.source() for table in self._tables]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            return None
        made_of = (
            self.store.addresses(),
            [(_address(s.assignments), _address(s.coefficients), s.num_ids, s.hot_from) for s in known],
        )
        if self._cached is None or self._cached.made_of != made_of:
            self._cached = _jobs(self._tables, known, self.store.weights(), self.width, made_of)
        return self._cached


def _jobs(
    tables: Sequence[LookupTable],
    sources: Sequence[RowSource],
    weights: Sequence[Tensor],
    width: int,
    made_of: tuple[Any, ...],
) -> _Jobs:
    starts = list(itertools.accumulate((weight.numel() for weight in weights), initial=0))
    words: dict[_Kind, list[list[int]]] = {}
    for table, source in zip(tables, sources, strict=True):
        dtype = None if source.assignments is None else source.assignments.dtype
        for piece in table.pieces:
            weight, start = weights[piece.weight], starts[piece.weight]
            dim, address = weight.shape[1], _address(weight)
            for feature, out in enumerate(piece.outs, start=table.first_feature):
                aligned = 4 if address % 16 == 0 and not any(n % 4 for n in (dim, out, start, width)) else 1
                has_hot = source.hot_from is not None
                kind = _Kind(dim, source.num_stored, source.num_hashes, has_hot, dtype, aligned)
                job = [address, *_rows_of(source, piece.column), feature, out, start, source.hot_from or 0]
                words.setdefault(kind, []).append(job)
    pointed = tuple(t for source in sources for t in (source.assignments, source.coefficients) if t is not None)
    return _Jobs(
        made_of=made_of,
        device=weights[0].device,
        of_kinds={kind: torch.tensor(jobs, device=weights[0].device) for kind, jobs in words.items()},
        sources=pointed,
        is_plain=takes(*weights, *pointed) and all(weight.dtype == torch.float32 for weight in weights),
        is_bounded=any(source.num_ids >= 0 for source in sources),
    )


def _rows_of(source: RowSource, column: int) -> list[int]:
    """The words of a job that say which rows an id has in a column."""
    return [
        _address(source.assignments),
        _address(source.coefficients),
        column * source.num_stored,
        0 if source.assignments is None else source.assignments.shape[1],
        source.first_id,
        source.num_ids,
        source.level_rows,
        1 + column * source.num_hashes,
        source.num_hashed_rows,
        source.hashed_from,
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(kernel: Any, lookup: TritonLookup, jobs: _Jobs, batch: _Given, *tensors: Tensor) -> None:
    """A kernel for all jobs, one launch a kind; ``tensors``: what it takes after the batch."""
    ids_N, offsets, weights_N = batch
    size = (len(offsets) - 1) // lookup.num_features
    for kind, words in jobs.of_kinds.items() if size else ():
        constants = kind.constants()
        grid = (len(words) * triton.cdiv(size, constants["BLOCK_B"]),)
        with torch.cuda.device_of(ids_N):
            kernel[grid](
                words, ids_N, offsets, ids_N if weights_N is None else weights_N, *tensors, len(words), size,
                WORDS=JOB_WORDS, OUT_WIDTH=lookup.width, WEIGHTED=weights_N is not None, **constants,
            )  # fmt: skip


class _Lookup(torch.autograd.Function):
    """The kernels as a function that autograd knows."""

    @staticmethod
    def forward(ctx: Any, lookup: TritonLookup, batch: _Given, jobs: _Jobs, *inputs: Tensor) -> Tensor:
        """Pooled vectors."""
        device = batch[0].device
        out = torch.empty((len(batch[1]) - 1) // lookup.num_features, lookup.width, device=device)
        all_inside = torch.ones(1, dtype=torch.int32, device=device)
        _launch(lookup_kernel, lookup, jobs, batch, out, all_inside)
        if lookup.asserts and jobs.is_bounded:
            torch._assert_async(all_inside)
        ctx.lookup, ctx.batch, ctx.jobs = lookup, batch, jobs
        ctx.save_for_backward(*jobs.sources)  # a backward after they changed in place is an error
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BW: Tensor) -> tuple[Tensor | None, ...]:
        """Dense gradients."""
        _ = ctx.saved_tensors  # raises where one has changed since
        store = ctx.lookup.store
        flat = torch.zeros(sum(weight.numel() for weight in store.weights()), device=gradient_BW.device)
        gradient_BW = gradient_BW.float().contiguous()
        _launch(lookup_backward_kernel, ctx.lookup, ctx.jobs, ctx.batch, gradient_BW, flat)
        return None, None, None, *store.gradients(flat)
