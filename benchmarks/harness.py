"""What the benchmarks share: ways that take turns, medians and ratios with their spread, a ceiling, files of results.

A machine that others use gets slower and faster by the minute. So the ways to be compared run in *rounds*: each way takes
one turn a round, in an order that changes, and a ratio is taken between turns of the same round before any median is.

The ceiling is memory: `copying` is one way more, and says what a byte takes that is read or written.
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

Turn = TypeVar("Turn")


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


def take_turns(
    ways: Mapping[str, Callable[[], Turn]], rounds: int, seconds: float = float("inf"), seed: int = 0
) -> dict[str, list[Turn]]:
    """What each way returned, one value a round; the order within a round is random but the same for the same seed.

    No round begins when ``seconds`` have passed, but for the first. Ranks whose ways call collectives must all call this
    with the same arguments; they agree on when the time is up.
    """
    order, shuffle = list(ways), random.Random(seed)
    taken: dict[str, list[Turn]] = {name: [] for name in ways}
    started = time.perf_counter()
    for round_ in range(rounds):
        if round_ and _is_up(time.perf_counter() - started > seconds):
            break
        shuffle.shuffle(order)
        for name in order:
            taken[name].append(ways[name]())
    return taken


def _is_up(is_mine: bool) -> bool:
    """Whether the time of any rank is up."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return is_mine
    votes = torch.tensor([int(is_mine)])
    dist.all_reduce(votes)
    return bool(votes)


def keep_freed_memory() -> None:
    """Let glibc's malloc give nothing back to the system, of tensors up to 32 MiB.

    Else it is chance which way's tensors are in new pages, which may take longer to come than all else a turn does.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def copying(clock: Callable[[], float] = time.process_time, num_bytes: int = 1 << 27) -> Callable[[], float]:
    """A way: seconds a byte that is read or written, in a copy that no cache holds."""
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def turn() -> float:
        start = clock()
        target.copy_(source)
        return (clock() - start) / num_bytes

    return turn


def times_ceiling(seconds: Sequence[float], num_bytes: float, copies: Sequence[float]) -> Spread:
    """How many times what :func:`copying` would take for ``num_bytes``, round by round."""
    return ratio(seconds, [num_bytes * a_byte for a_byte in copies])


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times ``base``, round by round."""
    return Spread.of([value / other for value, other in zip(values, base, strict=True)])


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """What all benchmarks are asked: how long, and where the results go."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each way, at most")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no round after that many, but the first"
    )
    parser.add_argument("--folder", type=Path, help="write the results there, such as docs/results (default: nowhere)")


def write_results(name: str, content: Mapping[str, Any], page: str, folder: Path = RESULTS) -> None:
    """``<name>.json`` with the raw numbers and ``<name>.md`` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in ((f"{name}.json", json.dumps(content, indent=1) + "\n"), (f"{name}.md", page)):
        partial = folder / f"{file}.partial"
        partial.write_text(text)
        partial.replace(folder / file)
