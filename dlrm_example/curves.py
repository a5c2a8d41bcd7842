"""Scores of several seeds by size: means, spreads, and where a method is first as good as full tables."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Scores at one size, one a seed."""

    size: float
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


Curve = Sequence[Measured]


@dataclass(frozen=True)
class Crossing:
    """The first crossing of a level; `stays` is whether every larger size is at or below it too."""

    at: Measured
    stays: bool


def first_crossing(curve: Curve, level: float) -> Crossing | None:
    """The smallest size that was tried whose mean loss is at or below the level; None where none is.

    Nothing is interpolated between sizes: what is claimed was measured.
    """
    points = sorted(curve, key=lambda point: point.size)
    for number, point in enumerate(points):
        if point.mean <= level:
            return Crossing(point, stays=all(larger.mean <= level for larger in points[number:]))
    return None


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
