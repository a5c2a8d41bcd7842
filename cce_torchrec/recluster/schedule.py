"""When to re-cluster: a few times, evenly, and not towards the end."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cce_torchrec.methods.base import check_not_negative, check_positive
from cce_torchrec.recluster.background import recluster_in_background, reclustering_of
from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport
from cce_torchrec.recluster.gradients import record_gradients
from cce_torchrec.recluster.step import recluster

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReclusterSchedule:
    """Drives re-clusterings from a training loop; call :meth:`step` after each optimizer step.

    With n re-clusterings in the first S = stop_after_fraction * total_steps steps, they come after steps S/n, 2S/n, ..., S.

    Args:
        total_steps: length of the training, in optimizer steps; ``None`` where it is not known: then it goes by
            ``every_steps`` until the end.
        count: n, how many re-clusterings. Few are better than many: each disturbs what the optimizer has settled.
        stop_after_fraction: none after this part of the training, so that the last codebooks are trained out.
        every_steps: instead of ``count``: one every so many steps.
        gradient_steps: how many steps before each re-clustering record the gradients that steer it (see
            :func:`record_gradients`); 0 for none. Those steps take longer, and host memory for the ids seen in them.
        background_steps: how many steps are trained while a re-clustering is computed on another thread (see
            :func:`recluster_in_background`), or fewer where the training ends; after so many, training waits for what is
            not done. 0 stops training for the whole of it.
        seed: of the re-clusterings; each draws its own from it and the step.
        config: of the re-clusterings.

    Raises:
        ValueError: sizes below 1, a fraction outside (0, 1], neither ``total_steps`` nor ``every_steps``, or as many
            ``background_steps`` as there are between two re-clusterings.

    Example:
        >>> ReclusterSchedule(total_steps=1000, count=4).steps
        (200, 400, 600, 800)
    """

    total_steps: int | None
    count: int = 6
    stop_after_fraction: float = 0.8
    every_steps: int | None = None
    gradient_steps: int = 100
    background_steps: int = 0
    seed: int = 0
    config: ReclusterConfig = field(default_factory=ReclusterConfig)

    def __post_init__(self) -> None:
        check_positive(count=self.count)
        if self.total_steps is not None:
            check_positive(total_steps=self.total_steps)
        elif self.every_steps is None:
            raise ValueError("total_steps=None needs every_steps: give one of both.")
        if self.every_steps is not None:
            check_positive(every_steps=self.every_steps)
        check_not_negative(gradient_steps=self.gradient_steps, background_steps=self.background_steps)
        if not 0 < self.stop_after_fraction <= 1:
            raise ValueError(f"stop_after_fraction={self.stop_after_fraction} is not in (0, 1].")
        self._check_background_steps()

    def _check_background_steps(self) -> None:
        if self.every_steps is not None:
            shortest = self.every_steps
        else:
            shortest = min((later - step for step, later in pairwise(self.steps)), default=self.background_steps + 1)
        if self.background_steps >= shortest:
            raise ValueError(
                f"background_steps={self.background_steps} must be less than the {shortest} steps between two re-clusterings."
            )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """After which steps it re-clusters, where ``total_steps`` is known."""
        if self.total_steps is None:
            raise ValueError("total_steps=None: a training of unknown length has no list of steps; ask is_due(step).")
        last = int(round(self.total_steps * self.stop_after_fraction, 6))  # 0.29 * 100 is 28.999999999999996
        if self.every_steps is not None:
            return tuple(range(self.every_steps, last + 1, self.every_steps))
        return tuple(sorted({step for i in range(self.count) if (step := last * (i + 1) // self.count) > 0}))

    def is_due(self, completed_steps: int) -> bool:
        """Whether a re-clustering begins after so many steps, and ends there, too, but for ``background_steps``."""
        if self.total_steps is None:
            assert self.every_steps is not None
            return completed_steps > 0 and completed_steps % self.every_steps == 0
        return completed_steps in self.steps

    def _under_way(self, completed_steps: int) -> tuple[int, int] | None:
        """The steps after which the re-clustering begins and ends that is under way after so many, or ends there."""
        if self.total_steps is None:
            assert self.every_steps is not None
            begin = completed_steps - completed_steps % self.every_steps
        else:
            begin = max((step for step in self.steps if step <= completed_steps), default=0)
        end = begin + self.background_steps
        if self.total_steps is not None:
            end = min(end, self.total_steps)
        return (begin, end) if begin and completed_steps <= end else None

    def records(self, completed_steps: int) -> bool:
        """Whether the gradients of the step after so many are recorded: none while a re-clustering is under way."""
        under_way = self._under_way(completed_steps)
        if under_way is not None and completed_steps < under_way[1]:
            return False
        if self.total_steps is None:
            assert self.every_steps is not None
            left: int | None = self.every_steps - completed_steps % self.every_steps
        else:
            left = min((step - completed_steps for step in self.steps if step > completed_steps), default=None)
        return left is not None and left <= self.gradient_steps

    def step(
        self,
        completed_steps: int,
        module: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        process_group: Any = None,
        id_weights: Mapping[str, Tensor] | None = None,
    ) -> ReclusterReport | None:
        """Re-cluster if it is due, or begin it, or end it; collective where ``module`` is sharded.

        Args:
            completed_steps: optimizer steps done so far; a function of it alone, so a resumed run goes on as it would have.
            module: as for :func:`recluster`.
            optimizer: as for :func:`recluster`.
            process_group: as for :func:`recluster`.
            id_weights: as for :func:`recluster`.

        Returns:
            The report, or ``None`` where no re-clustering ended.
        """
        report = None
        steps = self._under_way(completed_steps)
        if steps is not None:
            begin, end = steps
            options: dict[str, Any] = {
                "seed": self.seed * 1_000_003 + begin,
                "config": self.config,
                "process_group": process_group,
                "optimizer": optimizer,
                "id_weights": id_weights,
            }
            if self.background_steps == 0:
                report = recluster(module, **options)
            else:
                # One that a checkpoint interrupted is begun again, later than it was.
                under_way = reclustering_of(module) or recluster_in_background(module, **options)
                if completed_steps == end:
                    report = under_way.commit()
        if report is not None:
            logger.info("Re-clustered after step %d of %s:\n%s", completed_steps, self.total_steps or "?", report)
        record_gradients(module, on=self.records(completed_steps))
        return report
