"""Training as it goes: one log line a window of steps, from rank 0."""

from dataclasses import dataclass, field

import torch
from torchmetrics.classification import BinaryAUROC

from dlrm_example.distributed import World


@dataclass
class Window:
    """What was trained since the last line; after a restart it begins where training goes on. Losses are all ranks'."""

    world: World
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits_B: torch.Tensor, labels_B: torch.Tensor) -> None:
        """One step's, of this rank."""
        self.logits.append(logits_B.detach())
        self.labels.append(labels_B.detach())

    def scores(self) -> dict[str, float]:
        """Over all ranks; collective.

        `auroc` is of the predictions that training made, each before its own step.
        """
        auroc = BinaryAUROC().to(self.world.device)
        auroc.update(torch.sigmoid(torch.cat(self.logits)), torch.cat(self.labels))
        rows = sum(map(len, self.labels)) * self.world.size
        return {
            "samples_per_s": rows / self.seconds,
            "loss": sum(self.losses) / len(self.losses),
            "auroc": float(auroc.compute()),
        }
