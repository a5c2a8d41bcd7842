"""Replicated (data-parallel) codebooks: how their gradients are reduced, and optimizers applied in backward to them.

TorchRec leaves ``apply_optimizer_in_backward`` out for data-parallel tables, without a word. Here a DDP communication hook
all-reduces a bucket of gradients and then steps the optimizers that were asked for, so that a table trains the same
whether the planner makes it data-parallel or not. Their state has the names of FBGEMM's, so checkpoints move between both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec.in_backward import RUNNABLE, OptimizerRequest, requests_of


def requested_optimizers(collection: EmbeddingBagCollection) -> dict[str, OptimizerRequest]:
    """The optimizers to apply in backward, by physical table; to be read before TorchRec shards the collection."""
    requests = {}
    for name, bag in collection.embedding_bags.items():
        if asked := requests_of(bag.weight):
            requests[name] = asked[0]
    return requests


class InBackwardOptimizer(KeyedOptimizer):
    """The optimizer of one replicated codebook; it steps in backward, so :meth:`step` does nothing."""

    def __init__(self, table: str, weight: nn.Parameter, request: OptimizerRequest) -> None:
        if request.optimizer not in RUNNABLE:
            names = sorted({cls.__name__ for cls in RUNNABLE})
            raise ValueError(
                f"Table {table!r} is planned data-parallel, where {request.optimizer.__name__} cannot be applied in "
                f"backward; use one of {names}, or constrain the table to another sharding type."
            )
        self._table = table
        self._weight = nn.Parameter(weight.detach())  # shares the codebook's memory, with a gradient of its own
        self._optimizer = RUNNABLE[request.optimizer]([self._weight], **request.options)
        super().__init__({f"embedding_bags.{table}.weight": self._weight}, {}, self._optimizer.param_groups)

    @property
    def state(self) -> Mapping[Any, Any]:
        """By parameter: the tensors of the optimizer itself, under FBGEMM's names."""
        own = self._optimizer.state.get(self._weight, {})
        if isinstance(self._optimizer, torch.optim.Adagrad | RowWiseAdagrad):
            accumulator = own["sum"]
            per_row = isinstance(self._optimizer, RowWiseAdagrad)
            return {self._weight: {f"{self._table}.momentum1": accumulator.view(-1) if per_row else accumulator}}
        return {self._weight: {f"{self._table}.{name}": value for name, value in own.items()}} if own else {}

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        """The state is the optimizer's; what the base class would keep beside it is dropped."""

    def step(self, closure: Any = None) -> None:
        """Nothing: the step was taken in backward."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing: the gradient was used up in backward."""

    @torch.no_grad()
    def step_in_backward(self, gradient: Tensor) -> None:
        """Take a step with a reduced gradient, and zero it."""
        self._weight.grad = gradient.view_as(self._weight)
        self._optimizer.step()
        self._weight.grad = None
        gradient.zero_()


@dataclass(frozen=True)
class _Slice:
    """Where one table lies in the flat parameter that DDP reduces."""

    start: int
    end: int
    optimizer: InBackwardOptimizer


@dataclass(frozen=True)
class _Reduction:
    """How one DDP module reduces, and whom it steps: the tables in each of its flat parameters, by ``id``."""

    group: dist.ProcessGroup
    slices: Mapping[int, list[_Slice]]


def _reduce_then_step(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP communication hook: all-reduce a bucket, then step the optimizers of the tables in it."""
    buffer = bucket.buffer().div_(dist.get_world_size(reduction.group))
    work = dist.all_reduce(buffer, group=reduction.group, async_op=True)

    def finish(future: torch.futures.Future[Any]) -> Tensor:
        for flat, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for part in reduction.slices.get(id(flat), []):
                part.optimizer.step_in_backward(gradient.view(-1)[part.start : part.end])
        return future.value()[0]

    return work.get_future().then(finish)


def train_replicated(sharded: ShardedEmbeddingBagCollection, requests: Mapping[str, OptimizerRequest]) -> None:
    """Give the data-parallel tables of a sharded collection the optimizers that were asked for.

    Args:
        sharded: TorchRec's collection; its fused optimizer is extended.
        requests: by physical table; tables without one keep their gradients, for a dense optimizer.
    """
    optimizers: dict[str, InBackwardOptimizer] = {}
    slices: dict[int, list[_Slice]] = {}
    for table, sharding in sharded.module_sharding_plan.items():
        if sharding.sharding_type != ShardingType.DATA_PARALLEL.value or table not in requests:
            continue
        weight = sharded.embedding_bags[table].weight
        optimizers[table] = InBackwardOptimizer(table, weight, requests[table])
        weight._in_backward_optimizers = [optimizers[table]]
        place = _Slice(weight._start_offset, weight._end_offset, optimizers[table])
        slices.setdefault(id(weight._original_tensor), []).append(place)
    if not optimizers:
        return
    for lookup in sharded._lookups:
        if isinstance(lookup, DistributedDataParallel):
            lookup.register_comm_hook(_Reduction(lookup.process_group, slices), _reduce_then_step)
    own = [("", optimizer) for optimizer in optimizers.values()]
    sharded._optim = CombinedOptimizer([*sharded._optim.optimizers, *own])
