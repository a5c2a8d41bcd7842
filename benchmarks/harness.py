"""What the benchmarks share: ways that take turns, medians and ratios with their spread, and files of results.

A machine that others use gets slower and faster by the minute. So the ways to be compared run in *rounds*: each way takes
one turn a round, in an order that changes, and a ratio is taken between turns of the same round before any median is.
"""

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)

    def text(self, digits: int = 1) -> str:
        """``median (low - high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """What each way returned, one value a round; the order within a round is random but the same for the same seed.

    Ranks that call collectives in their ways must therefore use the same seed.
    """
    order, shuffle = list(ways), random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            taken[name].append(ways[name]())
    return taken


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times ``base``, round by round."""
    return Spread.of([value / other for value, other in zip(values, base, strict=True)])


def write_results(name: str, content: Mapping[str, Any], page: str, folder: Path = RESULTS) -> None:
    """``<name>.json`` with the raw numbers and ``<name>.md`` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page)
