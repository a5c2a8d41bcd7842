"""How far a training has come: what a checkpoint keeps beside the model, and what a summary is made from."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from dlrm_example.metrics import Scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores at one point of training; `test` only where it was asked for."""

    step: int
    epoch: int
    val: Scores
    test: Scores | None

    def by_split(self) -> dict[str, Scores]:
        return {"val": self.val} | ({"test": self.test} if self.test else {})


@dataclass(kw_only=True)
class Progress:
    """What has happened so far; `epoch` is the one of the last step, and `samples` counts rows of all ranks."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    recluster_seconds: float = 0.0
    reclusterings: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    losses_since_evaluation: list[float] = field(default_factory=list)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation BCE."""
        return min(self.evaluations, key=lambda evaluation: evaluation.val.bce, default=None)

    @property
    def is_best(self) -> bool:
        """Whether the weights as they are were evaluated, and as better than ever before."""
        best = self.best
        return best is not None and best is self.evaluations[-1] and best.step == self.step

    def improves(self, val: Scores) -> bool:
        """Whether these scores would be the best."""
        return self.best is None or val.bce < self.best.val.bce

    def step_of(self, auroc: float | None) -> int | None:
        """Where the first evaluation was that had such a validation AUROC."""
        if auroc is None:
            return None
        return next((evaluation.step for evaluation in self.evaluations if evaluation.val.auroc >= auroc), None)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        evaluations = [
            Evaluation(
                **{**each, "val": Scores(**each["val"]), "test": Scores(**each["test"]) if each["test"] else None}
            )
            for each in content["evaluations"]
        ]
        return cls(**{**content, "evaluations": evaluations})
