"""Replicated (data-parallel) codebooks: how their gradients are reduced, and optimizers applied in backward to them.

TorchRec leaves ``apply_optimizer_in_backward`` out for data-parallel tables, without a word. Here a DDP communication hook
all-reduces a bucket of gradients and then steps the optimizers that were asked for, so that a table trains the same
whether the planner makes it data-parallel or not. Their state has the names of FBGEMM's, so checkpoints move between both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Block:
    """Tables side by side in the flat parameter that DDP reduces, stepped as one: a step costs calls, not only arithmetic.

    Only where rows do not know of each other: Adam counts steps a table.

    Args:
        weights: of the tables, [rows, D] each, adjacent in memory.
        start: where the first lies in the flat parameter.
        request: the optimizer of all of them.
    """

    def __init__(self, weights: list[Tensor], start: int, request: OptimizerRequest) -> None:
        rows, dim = sum(len(weight) for weight in weights), weights[0].shape[1]
        first = weights[0].detach()
        # Shares the codebooks' memory, with a gradient of its own.
        self.weight = nn.Parameter(first.as_strided((rows, dim), (dim, 1)))
        self.optimizer = RUNNABLE[request.optimizer]([self.weight], **request.options)
        self.start, self.end = start, start + rows * dim
        self.tables: list[InBackwardOptimizer] = []

    def _options(self) -> dict[str, Any]:
        """What schedulers made of the learning rate and its like: the same for every table of the block."""
        first, *others = ([(k, v) for k, v in table.param_groups[0].items() if k != "params"] for table in self.tables)
        for table, options in zip(self.tables[1:], others, strict=True):
            if options != first:
                raise ValueError(
                    f"Replicated tables {self.tables[0].table!r} and {table.table!r} step together but were given different "
                    f"options after sharding, {dict(first)} and {dict(options)}: give them these before sharding."
                )
        return dict(first)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Take a step with the reduced gradient of the flat parameter, and zero the part of it that was used."""
        part = gradient.view(-1)[self.start : self.end]
        self.optimizer.param_groups[0].update(self._options())
        self.weight.grad = part.view_as(self.weight)
        self.optimizer.step()
        self.weight.grad = None
        part.zero_()


class InBackwardOptimizer(KeyedOptimizer):
    """The optimizer of one replicated codebook, a part of a block; it steps in backward, so :meth:`step` does nothing.

    Args:
        table: physical name.
        block: what steps.
        first_row: of the table in the block.
        num_rows: of the table.
    """

    def __init__(self, table: str, block: Block, first_row: int, num_rows: int) -> None:
        self.table, self._block = table, block
        self._rows = slice(first_row, first_row + num_rows)
        self._weight = nn.Parameter(block.weight.detach()[self._rows])
        group = block.optimizer.param_groups[0] | {"params": [self._weight]}
        super().__init__({f"embedding_bags.{table}.weight": self._weight}, {}, [group])
        block.tables.append(self)

    @property
    def state(self) -> Mapping[Any, Any]:
        """By parameter: the tensors of the optimizer itself, under FBGEMM's names."""
        own, optimizer = self._block.optimizer.state.get(self._block.weight, {}), self._block.optimizer
        if isinstance(optimizer, torch.optim.Adagrad | RowWiseAdagrad):
            accumulator = own["sum"][self._rows]
            per_row = isinstance(optimizer, RowWiseAdagrad)
            return {self._weight: {f"{self.table}.momentum1": accumulator.view(-1) if per_row else accumulator}}
        return {self._weight: {f"{self.table}.{name}": value for name, value in own.items()}} if own else {}

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        """The state is the optimizer's; what the base class would keep beside it is dropped."""

    def step(self, closure: Any = None) -> None:
        """Nothing: the step was taken in backward."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing: the gradient was used up in backward."""


class _Table(NamedTuple):
    """One replicated codebook: its weight knows its place in the flat parameter that DDP reduces."""

    name: str
    weight: Any
    request: OptimizerRequest


@dataclass(frozen=True)
class _Reduction:
    """How one DDP module reduces, and whom it steps: the blocks in each of its flat parameters, by ``id``."""

    group: dist.ProcessGroup
    blocks: Mapping[int, list[Block]]


def _reduce_then_step(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP communication hook: all-reduce a bucket, then step the optimizers of the tables in it."""
    buffer = bucket.buffer().div_(dist.get_world_size(reduction.group))
    work = dist.all_reduce(buffer, group=reduction.group, async_op=True)

    def finish(future: torch.futures.Future[Any]) -> Tensor:
        for flat, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for block in reduction.blocks.get(id(flat), []):
                block.step(gradient)
        return future.value()[0]

    return work.get_future().then(finish)


def train_replicated(sharded: ShardedEmbeddingBagCollection, requests: Mapping[str, OptimizerRequest]) -> None:
    """Give the data-parallel tables of a sharded collection the optimizers that were asked for.

    Args:
        sharded: TorchRec's collection; its fused optimizer is extended.
        requests: by physical table; tables without one keep their gradients, for a dense optimizer.
    """
    replicated = [
        _Table(name, sharded.embedding_bags[name].weight, requests[name])
        for name, sharding in sharded.module_sharding_plan.items()
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value and name in requests
    ]
    for table in replicated:
        _check_runnable(table)
    if not replicated:
        return
    optimizers: list[tuple[str, InBackwardOptimizer]] = []
    blocks: dict[int, list[Block]] = {}
    for tables in _side_by_side(replicated):
        first = tables[0]
        block = Block([table.weight for table in tables], first.weight._start_offset, first.request)
        blocks.setdefault(id(first.weight._original_tensor), []).append(block)
        row = 0
        for table in tables:
            optimizer = InBackwardOptimizer(table.name, block, row, len(table.weight))
            table.weight._in_backward_optimizers = [optimizer]
            optimizers.append(("", optimizer))
            row += len(table.weight)
    for lookup in sharded._lookups:
        if isinstance(lookup, DistributedDataParallel):
            lookup.register_comm_hook(_Reduction(lookup.process_group, blocks), _reduce_then_step)
    sharded._optim = CombinedOptimizer([*sharded._optim.optimizers, *optimizers])


def _check_runnable(table: _Table) -> None:
    if table.request.optimizer not in RUNNABLE:
        names = sorted({cls.__name__ for cls in RUNNABLE})
        raise ValueError(
            f"Table {table.name!r} is planned data-parallel, where {table.request.optimizer.__name__} cannot be applied in "
            f"backward; use one of {names}, or constrain the table to another sharding type."
        )


def _side_by_side(tables: list[_Table]) -> Iterator[list[_Table]]:
    """Cut the tables into runs that can be stepped as one: adjacent, as wide, trained alike, and row by row."""
    run: list[_Table] = []
    for table in sorted(tables, key=lambda table: (id(table.weight._original_tensor), table.weight._start_offset)):
        if run and not _can_follow(run[-1], table):
            yield run
            run = []
        run.append(table)
    if run:
        yield run


def _can_follow(last: _Table, table: _Table) -> bool:
    return (
        table.request == last.request
        and RUNNABLE[table.request.optimizer] is not torch.optim.Adam
        and table.weight._original_tensor is last.weight._original_tensor
        and table.weight._start_offset == last.weight._end_offset
        and table.weight.shape[1] == last.weight.shape[1]
    )
