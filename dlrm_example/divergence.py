"""Losses and weights that are no longer finite: how they are found, and what is said of them.

Nothing waits for the device at every step. Losses are looked at when a line is logged, and before every evaluation,
re-clustering and checkpoint; each is kept until then, so the first that is not finite is named by its very step, up to
`--log_every_steps` late. Weights and optimizer state are looked at before a re-clustering and before they are saved.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer

from cce_torchrec.checkpoint import checkpoint_state
from dlrm_example.checkpoints import Checkpoints
from dlrm_example.data import BatchLoader
from dlrm_example.distributed import World


class TrainingDivergedError(RuntimeError):
    """The loss, the weights or the optimizer's state are no longer finite; the same on every rank."""


class Watch:
    """Keeps the losses of a training until they are asked for; every method but `add` is collective.

    Args:
        batches: of the training, to name those that a loss came of.
        first_step: what was done before; weights were finite then.
        world: the ranks.
    """

    def __init__(self, batches: BatchLoader, checkpoints: Checkpoints, first_step: int, world: World) -> None:
        self._batches, self._checkpoints, self._world = batches, checkpoints, world
        self._step = self._finite_step = first_step
        self._losses: list[Tensor] = []
        self._largest = (0.0, 0)  # loss and its step, since weights were last looked at

    def add(self, loss: Tensor) -> None:
        """The next step's."""
        self._losses.append(loss.detach())
        self._step += 1

    def take_losses(self) -> list[float]:
        """Those since they were last taken: means over the global batches, of which every rank has an equal share.

        Raises:
            TrainingDivergedError: one is infinite or NaN.
        """
        if not self._losses:
            return []
        totals_S = torch.stack(self._losses)
        self._losses.clear()
        if self._world.size > 1:
            dist.all_reduce(totals_S)
        losses = [total / self._world.size for total in totals_S.tolist()]
        for step, loss in enumerate(losses, self._step - len(losses) + 1):
            if not math.isfinite(loss):
                raise self.diverged(f"the training loss is {loss} at step {step} ({self._where(step)})")
            self._largest = max(self._largest, (loss, step))
        return losses

    def _where(self, step: int) -> str:
        epoch, batch = divmod(step - 1, len(self._batches))
        return f"epoch {epoch + 1}, {self._batches.position(epoch + 1, batch)}"

    def check_weights(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at all that a checkpoint would hold: weights, and the optimizers' state.

        Raises:
            TrainingDivergedError: some of it is infinite or NaN.
        """
        names = _not_finite(model, optimizer, self._world)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise self.diverged(f"{names[0]}{more} became infinite or NaN in {self.steps_to_blame}")
        self._finite_step, self._largest = self._step, (0.0, 0)

    @property
    def steps_to_blame(self) -> str:
        """Those since weights were last looked at."""
        return f"steps {self._finite_step + 1} to {self._step}"

    def diverged(self, what: str) -> TrainingDivergedError:
        """To be raised, by all ranks."""
        loss, step = self._largest
        before = f"; before that, the largest loss was {loss:.4g} at step {step} ({self._where(step)})" if step else ""
        return TrainingDivergedError(
            f"{what}{before}; try a smaller --learning_rate, or look for outliers in those rows; the last good checkpoint is "
            f"{self._checkpoints.last_path()}"
        )


def _not_finite(model: nn.Module, optimizer: Optimizer, world: World) -> list[str]:
    """The names of what is infinite or NaN on any rank."""
    tensors = _tensors(checkpoint_state(model, optimizer))
    here = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    found = [here]
    if world.size > 1:
        found = [[] for _ in range(world.size)]
        dist.all_gather_object(found, here)
    return sorted({name for names in found for name in names})


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Those that this rank holds, in nested dicts."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, ShardedTensor):
        for shard in state.local_shards():
            yield name, shard.tensor
    elif isinstance(state, Tensor):
        yield name, state
