"""Pooled lookups by the native kernels in place of FBGEMM's CPU kernels, which sort the indices of every table.

    out[b, f] = sum_{n in bag (b, f)} w_n W_t[index_n]                          t: the table of feature f
    g[row] = sum of w_n dL/dout over its occurrences;    m[row] += mean(g^2);    W_t[row] -= lr g / (sqrt(m) + eps)

Parameters, optimizer state and settings stay FBGEMM's own: its modules keep their tensors and only their forward is ours.
Gradients add up in buffers as large as the tables, so these kernels are for tables that are small beside a batch. The others,
and whatever else is not done here (other optimizers, types, devices, indices out of bounds), are left to FBGEMM's forward.

Shapes: F features, B bags of each, W the dims of all features together.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from cce_torchrec.native import library

_STEPPED = (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_SGD)


class _Table(ctypes.Structure):
    """As ``Table`` of lookup.cpp."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("first_feature", ctypes.c_int64),
        ("num_features", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    """As ``Batch`` of lookup.cpp."""

    _fields_ = [
        ("indices", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sample_weights", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


def use_native_lookups(module: nn.Module) -> int:
    """Give FBGEMM's table-batched embeddings inside ``module`` a native forward, where they are on the CPU and plain.

    Returns:
        How many there were.
    """
    if library() is None:
        return 0
    found = 0
    for part in module.modules():
        if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen) and _is_plain_fused(part):
            part.forward = NativeLookup(part, fused=True)
        elif isinstance(part, DenseTableBatchedEmbeddingBagsCodegen) and _is_plain(part, part.weights):
            part.forward = NativeLookup(part, fused=False)
        else:
            continue
        found += 1
    return found


def _tables_of_features(tbe: Any) -> list[int]:
    """The number of the table of each feature."""
    if isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
        return list(tbe.feature_table_map)
    starts = list(tbe.weights_physical_offsets)
    return [starts.index(start) for start in tbe.weights_offsets.tolist()]


def _is_plain(tbe: Any, weights: Tensor) -> bool:
    features = _tables_of_features(tbe)
    return (
        weights.is_cpu
        and weights.dtype == torch.float32
        and tbe.output_dtype == SparseType.FP32.as_int()
        and tbe.pooling_mode == PoolingMode.SUM
        and features == sorted(features)
    )


def _is_plain_fused(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    arguments = tbe.optimizer_args
    return (
        tbe.use_cpu
        and _is_plain(tbe, tbe.weights_host)
        and tbe.optimizer in _STEPPED
        and not arguments.gradient_clipping
        and arguments.max_norm == 0
        and arguments.weight_decay == 0
        and not tbe._used_rowwise_adagrad_with_counter
        and not tbe._used_rowwise_adagrad_with_global_weight_decay
    )


class NativeLookup:
    """The forward of one of FBGEMM's modules.

    Args:
        tbe: whose forward it becomes; its own is kept for what is not done here.
        fused: whether backward steps the optimizer; else it makes a dense gradient.
    """

    def __init__(self, tbe: Any, *, fused: bool) -> None:
        self._tbe, self._fused = tbe, fused
        self._fallback: Callable[..., Tensor] = tbe.forward
        self._columns_F = tbe.D_offsets.to(torch.int64).cpu().contiguous()
        features = _tables_of_features(tbe)
        numbers = range(len(tbe.split_embedding_weights()))
        self._features = [(features.index(t) if t in features else 0, features.count(t)) for t in numbers]
        self._num_rows = sum(len(weight) for weight in tbe.split_embedding_weights())

    def __call__(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Pooled vectors [B, W], as FBGEMM's."""
        plain = not any(value is not None for value in others.values()) and not torch.compiler.is_compiling()
        plain = plain and self._num_rows <= 2 * len(indices)
        if per_sample_weights is not None:
            plain = plain and not per_sample_weights.requires_grad
        if plain:
            weights = self._tbe.placeholder_autograd_tensor if self._fused else self._tbe.weights
            out: Tensor | None = _Lookup.apply(weights, self, indices, offsets, per_sample_weights)
            if out is not None:
                return out
        return self._fallback(indices, offsets, per_sample_weights, **others)

    def tables(self, gradient: Tensor | None = None) -> Any:
        """Where the tables are, as C structures; ``gradient``: dense, of all weights, to be added to."""
        tbe = self._tbe
        weights = tbe.split_embedding_weights()
        adagrad = self._fused and tbe.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD
        momenta = [state[0].data_ptr() for state in tbe.split_optimizer_states()] if adagrad else [None] * len(weights)
        flat = 0 if self._fused else tbe.weights.data_ptr()
        return (_Table * len(weights))(
            *[
                _Table(
                    weights=weight.data_ptr(),
                    momentum=momentum,
                    gradient=None if gradient is None else gradient.data_ptr() + weight.data_ptr() - flat,
                    rows=weight.shape[0],
                    dim=weight.shape[1],
                    first_feature=first_feature,
                    num_features=num_features,
                )
                for weight, momentum, (first_feature, num_features) in zip(
                    weights, momenta, self._features, strict=True
                )
            ]
        )

    def batch(self, indices: Tensor, offsets: Tensor, sample_weights: Tensor | None) -> _Batch:
        """A batch as a C structure; the tensors must outlive it."""
        return _Batch(
            indices=indices.data_ptr(),
            offsets=offsets.data_ptr(),
            sample_weights=None if sample_weights is None else sample_weights.data_ptr(),
            columns=self._columns_F.data_ptr(),
            size=(len(offsets) - 1) // (len(self._columns_F) - 1),
            width=int(self._columns_F[-1]),
        )

    def settings(self) -> tuple[float, float]:
        """Learning rate and eps."""
        if not self._fused:
            return 0.0, 0.0
        return float(self._tbe.learning_rate_tensor), float(self._tbe.optimizer_args.eps)


class _Lookup(torch.autograd.Function):
    """The kernels as a function that autograd knows."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        lookup: NativeLookup,
        indices: Tensor,
        offsets: Tensor,
        sample_weights: Tensor | None,
    ) -> Tensor | None:
        """Pooled vectors, or ``None`` where an index is out of bounds."""
        loaded = library()
        assert loaded is not None
        indices, offsets = indices.to(torch.int64).contiguous(), offsets.to(torch.int64).contiguous()
        sample_weights = None if sample_weights is None else sample_weights.float().contiguous()
        batch = lookup.batch(indices, offsets, sample_weights)
        out = torch.empty(batch.size, batch.width)
        tables = lookup.tables()
        fine = loaded.cce_lookup(tables, len(tables), ctypes.byref(batch), out.data_ptr(), torch.get_num_threads())
        ctx.lookup, ctx.batch = lookup, (indices, offsets, sample_weights)
        ctx.weights_shape = weights.shape
        return out if fine else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Step the optimizer, or return the dense gradient."""
        loaded = library()
        assert loaded is not None
        (gradient,) = gradients
        gradient = gradient.float().contiguous()
        dense = None if ctx.lookup._fused else torch.zeros(ctx.weights_shape)
        tables, batch = ctx.lookup.tables(dense), ctx.lookup.batch(*ctx.batch)
        loaded.cce_lookup_backward(
            tables,
            len(tables),
            ctypes.byref(batch),
            gradient.data_ptr(),
            *ctx.lookup.settings(),
            torch.get_num_threads(),
        )
        return dense, None, None, None, None
