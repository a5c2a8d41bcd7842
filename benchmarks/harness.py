"""What the benchmarks share: ways that take turns, medians and ratios with their spread, and a record of what made them.

A machine that others use gets slower and faster by the minute. So the ways to be compared run in *rounds*: each way takes
one turn a round, in an order that changes, and a ratio is taken between turns of the same round before any median is.
"""

import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


def provenance() -> dict[str, Any]:
    """What made a result: command (files by name, not where they are), commit, hardware, load, versions."""
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", "cce_torchrec", "benchmarks")
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name] if module is not None else sys.argv[:1]
    arguments = [Path(text).name if Path(text).is_absolute() else text for text in sys.argv[1:]]
    return {
        "command": shlex.join(["python", *program, *arguments]),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if dirty else ""),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("" if arguments[0] == "status" else "unknown")


def cpu_name() -> str:
    """As the machine gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_results(name: str, content: Mapping[str, Any], page: str, folder: Path = RESULTS) -> None:
    """``<name>.json`` with the raw numbers and ``<name>.md`` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page)
