"""What a script finds changed in TorchRec while it runs by ``python -m cce_torchrec.swap``; nothing else installs this.

* ``EmbeddingBagCollection(...)`` with a table that a rule matches makes a :class:`CompressedEmbeddingBagCollection`. Its
  full tables are never built.
* ``get_default_sharders()`` has our sharders, as after :func:`register_sharders`.
* ``EmbeddingShardingPlanner`` plans with :func:`parameter_constraints`, :class:`CompressedStorageReservation` and our
  estimators.
* ``DistributedModelParallel(...)`` is re-clustered on schedule, before the training step that follows.
* ``DataLoader`` says how long an epoch is, when it is iterated to train on.
"""

import functools
import inspect
import os
import sys
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import method_of
from cce_torchrec.methods import FullTable
from cce_torchrec.planner import (
    CompressedPerfEstimator,
    CompressedStorageEstimator,
    CompressedStorageReservation,
    parameter_constraints,
)
from cce_torchrec.recluster import ReclusterSchedule, record_gradients
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables
from cce_torchrec.replace import with_method
from cce_torchrec.swap.config import SwapConfig
from cce_torchrec.swap.epochs import Epochs
from cce_torchrec.swap.rules import choose
from cce_torchrec.swap.sharders import check_sharders, register_sharders, restore_sharders


@contextmanager
def swapped(config: SwapConfig) -> Iterator["Swap"]:
    """Install everything; on leaving, TorchRec is as before."""
    swap = Swap(config)
    with ExitStack() as stack:
        for owner, name, around in (
            (EmbeddingBagCollection, "__init__", swap.make_collection),
            (EmbeddingShardingPlanner, "__init__", _make_planner),
            (EmbeddingShardingPlanner, "plan", _plan),
            (DistributedModelParallel, "__init__", swap.make_distributed),
            (DataLoader, "__iter__", swap.iterate),
        ):
            original = getattr(owner, name)
            setattr(owner, name, _wrapped(original, around))
            stack.callback(setattr, owner, name, original)
        register_sharders()
        stack.callback(restore_sharders)
        stack.callback(register_optimizer_step_post_hook(swap.optimizer_stepped).remove)
        yield swap


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    return method


def _say(text: str) -> None:
    """On the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"cce_torchrec.swap: {text}", flush=True)


class Swap:
    """What is done to one run of a script.

    Args:
        config: rules and schedule.
    """

    def __init__(self, config: SwapConfig) -> None:
        self._config = config
        self._full_tables: list[str] = []
        self._num_compressed = 0
        self._optimizers: dict[int, weakref.ref[Optimizer]] = {}
        self._has_stepped = False
        self._reclusterers: list[tuple[weakref.ref[nn.Module], _Reclusterer]] = []

    def make_collection(
        self, original: Callable[..., None], collection: EmbeddingBagCollection, *args: Any, **kwargs: Any
    ) -> None:
        """In place of ``EmbeddingBagCollection.__init__``, in which the object may still become one of another class."""
        caller = sys._getframe(2).f_globals.get("__name__", "")
        is_own = caller.partition(".")[0] == "cce_torchrec"  # such as the codebooks of a compressed collection
        if type(collection) is not EmbeddingBagCollection or is_own:
            original(collection, *args, **kwargs)
            return
        given = inspect.signature(original).bind(collection, *args, **kwargs).arguments
        tables = [_with_rule(config, self._config) for config in given["tables"]]
        if all(isinstance(method_of(table), FullTable) for table in tables):
            self._full_tables += [table.name for table in tables]
            original(collection, *args, **kwargs)
            return
        self._num_compressed += 1
        compressed = cast(CompressedEmbeddingBagCollection, collection)
        compressed.__class__ = CompressedEmbeddingBagCollection
        options = {name: given[name] for name in ("is_weighted", "device") if name in given}
        CompressedEmbeddingBagCollection.__init__(compressed, tables, **options)
        _say(f"in {caller}, an EmbeddingBagCollection was replaced:\n{compressed.memory_report()}")

    def make_distributed(
        self, original: Callable[..., None], model: DistributedModelParallel, *args: Any, **kwargs: Any
    ) -> None:
        """Around ``DistributedModelParallel.__init__``: the model re-clusters itself."""
        given = inspect.signature(original).bind(model, *args, **kwargs).arguments
        check_sharders(given["module"], given.get("sharders"))
        original(model, *args, **kwargs)
        collections = [part for part in model.modules() if isinstance(part, Collection)]
        learns = any(True for collection in collections for _ in reclusterable_tables(collection))
        if self._config.schedule is not None and learns:
            reclusterer = _Reclusterer(self._config.schedule, Epochs(self._config.epochs), self)
            self._reclusterers.append((weakref.ref(model), reclusterer))
            model.register_forward_pre_hook(reclusterer)

    def iterate(self, original: Callable[..., Any], loader: DataLoader[Any]) -> Any:
        """Around ``DataLoader.__iter__``: where a model is in training mode, an epoch begins."""
        for ref, reclusterer in self._reclusterers:
            model = ref()
            if model is not None and model.training:
                reclusterer.begin_epoch(_length(loader))
        return original(loader)

    def optimizer_stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """A hook after every step of every optimizer of torch's."""
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self._has_stepped = True

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped since :meth:`take_step`."""
        return self._has_stepped

    def take_step(self) -> bool:
        """Whether an optimizer has stepped since this was last asked."""
        stepped, self._has_stepped = self._has_stepped, False
        return stepped

    def optimizers(self) -> list[Optimizer]:
        """Those that have stepped."""
        return [optimizer for ref in self._optimizers.values() if (optimizer := ref()) is not None]

    def finish(self) -> None:
        """Say what has not been done."""
        if not self._num_compressed:
            _say(
                f"nothing was replaced: no rule matches a table of {self._full_tables or 'no EmbeddingBagCollection'}."
            )
        elif self._config.schedule is not None and not self._reclusterers:
            _say("nothing was re-clustered: no DistributedModelParallel has a table with learned assignments.")


class _AllOptimizers:
    """As much of an optimizer as a re-clustering looks at, of several."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.state = ChainMap(*(cast(dict[Any, Any], optimizer.state) for optimizer in optimizers))
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except TypeError:  # of a dataset that does not say
        return None


class _Reclusterer:
    """A hook before the forward pass of a model: counts the training steps that were done and re-clusters after some.

    A step is a training forward pass after which an optimizer has stepped, so accumulated gradients count once.
    """

    def __init__(self, schedule: ReclusterSchedule, epochs: Epochs, swap: Swap) -> None:
        self._schedule, self._epochs, self._swap = schedule, epochs, swap
        self._completed, self._is_running, self._has_warned, self._is_over = 0, False, False, False

    def begin_epoch(self, length: int | None) -> None:
        """The training goes on with a loader from its start."""
        last_step = int(self._swap.has_stepped and self._is_running)  # which the next forward pass will count
        self._epochs.begin(length, self._completed + last_step)

    def __call__(self, model: nn.Module, _: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if self._swap.take_step() and self._is_running:
            self._completed += 1
            if self._schedule.is_due(self._completed):
                self._is_over = self._is_late()
            if self._is_over:
                record_gradients(model, on=False)
            else:
                self._recluster_if_due(model)
        self._is_running = True

    def _recluster_if_due(self, model: nn.Module) -> None:
        optimizers = cast(Optimizer, _AllOptimizers(self._swap.optimizers()))
        report = self._schedule.step(self._completed, model, optimizer=optimizers)
        if report is not None:
            _say(f"re-clustered after step {self._completed}:\n{report}")

    def _is_late(self) -> bool:
        """Whether the last part of the training has begun on any rank; collective, since loaders may differ in length."""
        if self._schedule.total_steps is not None:
            return False  # the schedule knows
        if not self._epochs.is_known and not self._has_warned:
            self._has_warned = True
            _say(
                "no DataLoader says how long an epoch is, so stop_after_fraction is of no effect in the first one: give "
                "total_steps."
            )
        late = torch.tensor(int(self._epochs.is_late(self._completed, self._schedule.stop_after_fraction)))
        if dist.is_initialized():
            device = torch.device("cuda") if "nccl" in dist.get_backend() else torch.device("cpu")
            late = late.to(device)
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return bool(late)


def _with_rule(config: EmbeddingBagConfig, swap: SwapConfig) -> EmbeddingBagConfig:
    if not isinstance(method_of(config), FullTable):
        return config
    try:
        method = choose(config, swap.rules)
    except ValueError as error:
        raise ValueError(f"Table {config.name!r}: {error}") from None
    return config if method is None else with_method(config, method)


def _make_planner(original: Callable[..., None], planner: EmbeddingShardingPlanner, *args: Any, **kwargs: Any) -> None:
    """Around the planner's constructor: constraints can be filled in later, and what it cannot see is reserved."""
    bound = inspect.signature(original).bind(planner, *args, **kwargs)
    given = dict(bound.arguments.get("constraints") or {})
    bound.arguments["constraints"] = dict(given)  # which its estimators share
    original(*bound.args, **bound.kwargs)
    planner._logical_constraints = given
    if bound.arguments.get("enumerator") is None:
        known = (planner._topology, planner._constraints)
        planner._enumerator._estimators = [CompressedPerfEstimator(*known), CompressedStorageEstimator(*known)]
    if not isinstance(planner._storage_reservation, CompressedStorageReservation):
        planner._storage_reservation = CompressedStorageReservation(planner._storage_reservation)


def _plan(
    original: Callable[..., Any], planner: EmbeddingShardingPlanner, module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Around the planner's ``plan``: constraints by logical table become those of physical ones."""
    if any(isinstance(part, CompressedEmbeddingBagCollection) for part in module.modules()):
        assert planner._constraints is not None
        translated = parameter_constraints(module, planner._logical_constraints, batch_size=planner._batch_size)
        planner._constraints.clear()
        planner._constraints.update(translated)
    return original(planner, module, *args, **kwargs)
