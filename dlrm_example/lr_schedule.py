"""The learning rate of every step: a linear rise, a plateau, a quadratic fall, as torchrec_dlrm's flags have it."""

from dataclasses import dataclass

from torch.optim import Optimizer

from dlrm_example.config import TrainConfig

LEAST = 1e-7  # what torchrec_dlrm's decay does not go below


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """A function of the step alone, so a resumed run goes on as it would have; steps count from 1.

        s / warmup_steps                                  for s < warmup_steps
        1                                                 until decay_start
        (1 - (s - decay_start) / decay_steps) ** 2        for decay_steps steps

    times `base`, and after that what it was in the last of them. It is at least 1e-7 while it falls. The one difference from
    torchrec_dlrm: there, the plateau of a schedule with a decay is that of the last warm-up step, 1 - 1 / warmup_steps.

    Example:
        >>> schedule = LearningRateSchedule(base=1.0, warmup_steps=4, decay_start=6, decay_steps=2)
        >>> [schedule.at(step) for step in range(1, 10)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    """

    base: float
    warmup_steps: int = 0
    decay_start: int = 0
    decay_steps: int = 0

    @classmethod
    def of(cls, config: TrainConfig) -> "LearningRateSchedule":
        return cls(
            base=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            decay_start=config.lr_decay_start,
            decay_steps=config.lr_decay_steps,
        )

    def at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        if self.decay_steps == 0 or step < self.decay_start:
            return self.base
        fallen = min(step - self.decay_start, self.decay_steps - 1) / self.decay_steps
        return max(LEAST, self.base * (1 - fallen) ** 2)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set it for a step to come. Optimizers that run in backward read it in `zero_grad`, before their step."""
        learning_rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
