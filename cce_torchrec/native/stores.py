"""Where the weights of a lookup are, and how they are trained: PyTorch's parameters, or those of FBGEMM's modules."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

_STEPPED = (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_SGD)


class Store(Protocol):
    """The weights of some tables.

    Attributes:
        steps: whether a backward steps the optimizer; else it makes a dense gradient.
    """

    steps: bool

    def inputs(self) -> list[Tensor]:
        """What autograd differentiates by."""

    def addresses(self) -> list[int]:
        """What changes where a tensor moves."""

    def weights(self) -> Sequence[Tensor]:
        """[rows, dim] each."""

    def momenta(self) -> Sequence[Tensor | None]:
        """Row-wise Adagrad's sum of each row, [rows] of each weight, where there is one."""

    def gradients(self, flat: Tensor | None) -> list[Tensor | None]:
        """The gradient of each input, given that of all weights, one after the other."""

    def settings(self) -> tuple[float, float]:
        """Learning rate and eps."""


class ParameterStore:
    """Weights of modules such as ``nn.EmbeddingBag``, trained by autograd."""

    steps = False

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def inputs(self) -> list[Tensor]:
        return [module.weight for module in self._modules]  # type: ignore[misc]

    def addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self.inputs()]

    def weights(self) -> Sequence[Tensor]:
        return self.inputs()

    def momenta(self) -> Sequence[Tensor | None]:
        return [None] * len(self._modules)

    def gradients(self, flat: Tensor | None) -> list[Tensor | None]:
        assert flat is not None
        weights = self.inputs()
        parts = flat.split([weight.numel() for weight in weights])
        return [part.view_as(w) if w.requires_grad else None for part, w in zip(parts, weights, strict=True)]

    def settings(self) -> tuple[float, float]:
        return 0.0, 0.0


class DenseStore:
    """Weights of FBGEMM's module for data-parallel tables: one flat parameter, trained by autograd."""

    steps = False

    def __init__(self, tbe: DenseTableBatchedEmbeddingBagsCodegen) -> None:
        self._tbe: Any = tbe

    def inputs(self) -> list[Tensor]:
        return [self._tbe.weights]

    def addresses(self) -> list[int]:
        return [self._tbe.weights.data_ptr()]

    def weights(self) -> Sequence[Tensor]:
        return self._tbe.split_embedding_weights()

    def momenta(self) -> Sequence[Tensor | None]:
        return [None] * len(self.weights())

    def gradients(self, flat: Tensor | None) -> list[Tensor | None]:
        return [flat]

    def settings(self) -> tuple[float, float]:
        return 0.0, 0.0


class FusedStore:
    """Weights of FBGEMM's module that trains them in backward; its learning rate is read in each."""

    steps = True

    def __init__(self, tbe: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self._tbe: Any = tbe
        self._has_momenta = tbe.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD

    def inputs(self) -> list[Tensor]:
        return [self._tbe.placeholder_autograd_tensor]

    def addresses(self) -> list[int]:
        return [
            self._tbe.weights_host.data_ptr(),
            *([self._tbe.momentum1_host.data_ptr()] if self._has_momenta else []),
        ]

    def weights(self) -> Sequence[Tensor]:
        return self._tbe.split_embedding_weights()

    def momenta(self) -> Sequence[Tensor | None]:
        if self._has_momenta:
            return [state[0] for state in self._tbe.split_optimizer_states()]
        return [None] * len(self.weights())

    def gradients(self, flat: Tensor | None) -> list[Tensor | None]:
        return [None]

    def settings(self) -> tuple[float, float]:
        return float(self._tbe.learning_rate_tensor), float(self._tbe.optimizer_args.eps)


def store_of(tbe: nn.Module) -> Store | None:
    """The store of one of FBGEMM's modules; ``None`` where it does what the kernels do not."""
    if isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen) and tbe.use_cpu and _steps_plainly(tbe):
        return FusedStore(tbe) if _is_plain(tbe, tbe.weights_host) else None
    if isinstance(tbe, DenseTableBatchedEmbeddingBagsCodegen):
        return DenseStore(tbe) if _is_plain(tbe, tbe.weights) and _is_packed(tbe) else None
    return None


def features_of_tables(tbe: Any) -> list[tuple[int, int]]:
    """The first feature of each table of one of FBGEMM's modules, and how many there are; they follow each other."""
    tables = _tables_of_features(tbe)
    return [(tables.index(t) if t in tables else 0, tables.count(t)) for t in range(len(tbe.split_embedding_weights()))]


def _tables_of_features(tbe: Any) -> list[int]:
    """The number of the table of each feature."""
    if isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
        return list(tbe.feature_table_map)
    starts = list(tbe.weights_physical_offsets)
    return [starts.index(start) for start in tbe.weights_offsets.tolist()]


def _is_packed(tbe: Any) -> bool:
    """Whether the flat gradient is what :meth:`Store.gradients` takes."""
    sizes = [weight.numel() for weight in tbe.split_embedding_weights()]
    starts = list(itertools.accumulate(sizes, initial=0))
    return starts[: len(sizes)] == list(tbe.weights_physical_offsets)[: len(sizes)]


def _is_plain(tbe: Any, weights: Tensor) -> bool:
    tables = _tables_of_features(tbe)
    return bool(
        weights.dtype == torch.float32
        and tbe.output_dtype == SparseType.FP32.as_int()
        and tbe.pooling_mode == PoolingMode.SUM
        and tables == sorted(tables)
    )


def _steps_plainly(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    arguments = tbe.optimizer_args
    return (
        tbe.optimizer in _STEPPED
        and not arguments.gradient_clipping
        and arguments.max_norm == 0
        and arguments.weight_decay == 0
        and not tbe._used_rowwise_adagrad_with_counter
        and not tbe._used_rowwise_adagrad_with_global_weight_decay
    )
