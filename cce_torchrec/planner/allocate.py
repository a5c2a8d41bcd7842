"""One option a table, so that the sum of their losses is the least that a budget allows; exact.

    minimise  sum_t loss(o_t)    over one option o_t of each table,   where  sum_t held(o_t) + max_t transient(o_t) <= budget

For each possible value of the maximum this is a multiple-choice knapsack. Partial choices are extended table by table, as
long as none is as small and as good, and only where a Lagrangian bound says that they may still win:

    loss so far + price * bytes so far + sum over the tables left of min_o(loss(o) + price * held(o)) - price * budget

with the price of a byte at which the linear relaxation is decided.

Legend: T tables, O options of one table, S partial choices.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MOST_STATES = (
    200_000  # partial choices that are kept; beyond, those of the best bounds, and ``gap`` says what that may cost
)
_TOLERANCE = 1e-12  # rounding, relative


class Option(NamedTuple):
    """A way to store one table.

    Attributes:
        held: bytes that it takes for good.
        transient: bytes that it takes for a while; only one table does at a time.
        loss: what it costs, at least 0.
    """

    held: int
    transient: int
    loss: float


class Allocation(NamedTuple):
    """What :func:`allocate` chose.

    Attributes:
        chosen: the number of the option of each table.
        loss: its sum.
        gap: by how much it may be above the least possible; 0 unless :data:`MOST_STATES` was not enough.
    """

    chosen: tuple[int, ...]
    loss: float
    gap: float


class _Knapsack(NamedTuple):
    """Options under one maximum of transient bytes, without those that others dominate, by rising bytes."""

    numbers: list[np.ndarray]
    held: list[np.ndarray]
    loss: list[np.ndarray]
    hull: list[list[int]]
    budget: int
    price: float
    bound: float


def smallest_budget(options: Sequence[Sequence[Option]]) -> int:
    """The least ``budget`` for which :func:`allocate` has a solution.

    Example:
        >>> smallest_budget([[Option(10, 0, 0.0), Option(2, 5, 1.0)], [Option(4, 5, 0.0)]])
        11
    """
    totals = []
    for ceiling in sorted({option.transient for of_table in options for option in of_table}):
        fitting = [[o.held for o in of_table if o.transient <= ceiling] for of_table in options]
        if all(fitting):
            totals.append(ceiling + sum(map(min, fitting)))
    return min(totals)


def allocate(options: Sequence[Sequence[Option]], budget: int) -> Allocation | None:
    """The best choice within the budget, or ``None`` where there is none.

    Example:
        >>> allocate([[Option(10, 0, 0.0), Option(2, 5, 1.0)], [Option(4, 0, 0.0), Option(1, 0, 0.3)]], 11).chosen
        (0, 1)
    """
    distinct: dict[tuple[Option, ...], _Arrays] = {}  # a thousand tables of one size are looked at once
    for of_table in map(tuple, options):
        if of_table not in distinct:
            distinct[of_table] = _Arrays(*map(np.array, zip(*of_table, strict=True)))
    arrays = [distinct[tuple(of_table)] for of_table in options]
    ceilings = sorted({option.transient for of_table in options for option in of_table})
    problems = [p for ceiling in ceilings if (p := _under(arrays, ceiling, budget - ceiling)) is not None]
    best: tuple[int, ...] | None = None
    best_loss = dropped = np.inf
    for problem in sorted(problems, key=lambda problem: problem.bound):
        if problem.bound >= best_loss * (1 - _TOLERANCE):
            break
        positions, dropped_here = _solve(problem, best_loss)
        dropped = min(dropped, dropped_here)
        if positions is not None:
            best = tuple(int(n[at]) for n, at in zip(problem.numbers, positions, strict=True))
            best_loss = sum(of_table[number].loss for of_table, number in zip(options, best, strict=True))
    if best is None:
        return None
    return Allocation(best, float(best_loss), max(0.0, float(best_loss - dropped)))


class _Arrays(NamedTuple):
    """The options of one table, by field."""

    held: np.ndarray
    transient: np.ndarray
    loss: np.ndarray


def _under(options: Sequence[_Arrays], ceiling: int, budget: int) -> _Knapsack | None:
    """The knapsack of the options up to ``ceiling``, with its price of a byte; ``None`` where nothing fits."""
    # Tables that are alike share their arrays, and are looked at once.
    alike = {id(of_table): _fitting(of_table, ceiling) for of_table in {id(each): each for each in options}.values()}
    tables = [alike[id(of_table)] for of_table in options]
    held, loss = [table.held for table in tables], [table.loss for table in tables]
    if any(len(sizes) == 0 for sizes in held) or sum(int(sizes[0]) for sizes in held) > budget:
        return None
    hulls = {key: _hull(table.held, table.loss) for key, table in alike.items()}
    hull = [hulls[id(of_table)] for of_table in options]
    price = _price(held, loss, hull, budget)
    bound = sum(float((lo + price * he).min()) for he, lo in zip(held, loss, strict=True)) - price * budget
    return _Knapsack([table.numbers for table in tables], held, loss, hull, budget, price, bound)


class _Fitting(NamedTuple):
    """Options of one table that are neither too large nor dominated, by rising bytes."""

    numbers: np.ndarray
    held: np.ndarray
    loss: np.ndarray


def _fitting(of_table: _Arrays, ceiling: int) -> _Fitting:
    fitting = np.flatnonzero(of_table.transient <= ceiling)
    sizes, losses = of_table.held[fitting], of_table.loss[fitting]
    keep = _undominated(sizes, losses)
    return _Fitting(fitting[keep], sizes[keep], losses[keep])


def _undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Positions, by rising size, of the pairs of which no other is as small and as good."""
    order = np.lexsort((losses, sizes))
    sorted_losses = losses[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]]) if len(order) else sorted_losses
    return order[sorted_losses < best_before]


def _hull(sizes: np.ndarray, losses: np.ndarray) -> list[int]:
    """Positions of the lower convex hull of options that fall in loss with rising size."""
    hull: list[int] = []
    for at in range(len(sizes)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (losses[a] - losses[b]) * (sizes[at] - sizes[b]) > (losses[b] - losses[at]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(at)
    return hull


def _price(held: list[np.ndarray], loss: list[np.ndarray], hulls: list[list[int]], budget: int) -> float:
    """The loss that one more byte saves where the linear relaxation of the knapsack runs out of budget."""
    steps = []
    for sizes, losses, hull in zip(held, loss, hulls, strict=True):
        steps.append(np.stack([np.diff(sizes[hull]), -np.diff(losses[hull])]))
    bytes_, gains = np.concatenate(steps, axis=1)
    order = np.argsort(-gains / bytes_) if len(bytes_) else np.zeros(0, dtype=np.int64)
    room = budget - sum(int(sizes[0]) for sizes in held)
    full = np.flatnonzero(np.cumsum(bytes_[order]) > room)
    return float(gains[order[full[0]]] / bytes_[order[full[0]]]) if len(full) else 0.0


def _greedy(problem: _Knapsack) -> float:
    """The loss of a good choice: along the hulls, the steepest step that still fits first."""
    at = [0] * len(problem.held)
    hulls = problem.hull
    room = problem.budget - sum(int(sizes[0]) for sizes in problem.held)
    steps = [
        ((losses[b] - losses[a]) / (sizes[b] - sizes[a]), table, place, int(sizes[b] - sizes[a]))
        for table, (hull, sizes, losses) in enumerate(zip(hulls, problem.held, problem.loss, strict=True))
        for place, (a, b) in enumerate(pairwise(hull))
    ]
    for _, table, place, size in sorted(steps):
        if at[table] == place and size <= room:
            at[table], room = place + 1, room - size
    return sum(float(problem.loss[t][hulls[t][place]]) for t, place in enumerate(at))


def _solve(problem: _Knapsack, to_beat: float) -> tuple[list[int] | None, float]:
    """The best choice if it is below ``to_beat``, and the least bound of what was dropped for lack of room."""
    greedy = _greedy(problem)
    limit = min(to_beat, greedy) + _TOLERANCE * max(greedy, problem.price * problem.budget)
    rest_held = np.cumsum([int(sizes[0]) for sizes in problem.held][::-1])[::-1]
    priced = [float((lo + problem.price * he).min()) for he, lo in zip(problem.held, problem.loss, strict=True)]
    rest_priced = np.cumsum(priced[::-1])[::-1]
    held_S, loss_S = np.zeros(1, dtype=np.int64), np.zeros(1)
    stages: list[tuple[np.ndarray, np.ndarray]] = []
    dropped = np.inf
    for table, (held_O, losses_O) in enumerate(zip(problem.held, problem.loss, strict=True)):
        last = table + 1 == len(problem.held)
        left_held, left_priced = (0, 0.0) if last else (int(rest_held[table + 1]), float(rest_priced[table + 1]))
        held = (held_S[:, None] + held_O).ravel()
        loss = (loss_S[:, None] + losses_O).ravel()
        bound = loss + problem.price * (held - problem.budget) + left_priced
        open_ = np.flatnonzero((held + left_held <= problem.budget) & (bound <= limit))
        open_ = open_[_undominated(held[open_], loss[open_])]
        if len(open_) > MOST_STATES:
            open_ = open_[np.argsort(bound[open_], kind="stable")]
            dropped = min(dropped, float(bound[open_[MOST_STATES]]))
            open_ = open_[:MOST_STATES]
        stages.append((open_ // len(held_O), open_ % len(held_O)))
        held_S, loss_S = held[open_], loss[open_]
    if len(loss_S) == 0:
        return None, dropped
    state = int(loss_S.argmin())
    if loss_S[state] >= to_beat:
        return None, dropped
    positions = []
    for parents, taken in reversed(stages):
        positions.append(int(taken[state]))
        state = int(parents[state])
    return positions[::-1], dropped
