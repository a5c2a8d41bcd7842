"""Several computations in step, so that what they ask of the other ranks travels in common messages.

Such a computation is a generator: it yields a :class:`Sum`, :class:`Rows` or :class:`Once` where it needs the other ranks,
is sent the answer, and returns its result. What it asks for, and when, must be the same on every rank.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from cce_torchrec.recluster.collectives import Collectives


@dataclass(frozen=True)
class Sum:
    """Asks for the sum of every rank's float64 ``tensor``."""

    tensor: Tensor


@dataclass(frozen=True)
class Rows:
    """Asks for every rank's int64 rows [M, X], one rank's after another's, on the CPU; M may differ between ranks."""

    tensor: Tensor


@dataclass(frozen=True)
class Once:
    """Asks for the int64 rows [M, 1], on the CPU, that ``work`` returns; one rank does it for all."""

    work: Callable[[], Tensor]


Result = TypeVar("Result")
Steps: TypeAlias = Generator[Sum | Rows | Once, Tensor, Result]


@torch.no_grad()
def run_together(computations: Sequence[Steps[Result]], ranks: Collectives) -> list[Result]:
    """The results of all computations, which have at most one sum and one gather at a time among them; collective.

    Raises:
        RuntimeError: on every rank, where a computation raised on another one.
        Exception: what a computation raised, where it did on every rank.

    Example:
        >>> from cce_torchrec.recluster.collectives import LocalCollectives
        >>> def total(numbers: Tensor) -> Steps[float]:
        ...     return float((yield Sum(numbers.sum())))
        >>> run_together([total(torch.ones(2).double()), total(torch.ones(3).double())], LocalCollectives())
        [2.0, 3.0]
    """
    results: dict[int, Result] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(computations)))
    with ranks.one_fails_all_fail():
        while answers:
            sums: dict[int, Tensor] = {}
            rows: dict[int, Tensor] = {}
            for number, answer in answers.items():
                steps = computations[number]
                try:
                    request = next(steps) if answer is None else steps.send(answer)
                except StopIteration as finished:
                    results[number] = finished.value
                    continue
                if isinstance(request, Sum):
                    sums[number] = request.tensor
                elif isinstance(request, Rows):
                    rows[number] = request.tensor
                else:
                    rows[number] = request.work() if ranks.is_mine(number) else torch.empty(0, 1, dtype=torch.int64)
            answers = {**_summed(sums, ranks), **_gathered(rows, ranks)}
    return [results[number] for number in range(len(computations))]


def _summed(parts: dict[int, Tensor], ranks: Collectives) -> dict[int, Tensor]:
    """Each part's sum over ranks, by one message."""
    if not parts:
        return {}
    total = ranks.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts.values()]))
    totals = total.split([part.numel() for part in parts.values()])
    return {number: one.view_as(part) for (number, part), one in zip(parts.items(), totals, strict=True)}


def _gathered(parts: dict[int, Tensor], ranks: Collectives) -> dict[int, Tensor]:
    """Each part's rows of all ranks, by one message: rows as wide as the widest, behind the number of their part."""
    if not parts:
        return {}
    widest = max(part.shape[1] for part in parts.values())
    framed = [pad(pad(part, (0, widest - part.shape[1])), (1, 0), value=number) for number, part in parts.items()]
    rows = ranks.all_gather_rows(torch.cat(framed))
    return {number: rows[rows[:, 0] == number, 1 : 1 + part.shape[1]] for number, part in parts.items()}
