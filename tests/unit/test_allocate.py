"""The allocation against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_torchrec.planner import allocate as module
from cce_torchrec.planner.allocate import Option, allocate, smallest_budget

OPTIONS = st.builds(
    Option, st.integers(0, 12), st.integers(0, 4), st.integers(0, 10).map(lambda tenths: tenths / 10) | st.floats(0, 1)
)
TABLES = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def needs(options: tuple[Option, ...]) -> int:
    return sum(option.held for option in options) + max(option.transient for option in options)


@settings(max_examples=300)
@given(tables=TABLES, budget=st.integers(0, 50))
def test_the_least_loss_of_all_choices(tables: list[list[Option]], budget: int) -> None:
    choices = [choice for choice in itertools.product(*tables) if needs(choice) <= budget]
    allocation = allocate(tables, budget)
    assert smallest_budget(tables) == min(needs(choice) for choice in itertools.product(*tables))
    if not choices:
        assert allocation is None
        return
    assert allocation is not None
    chosen = tuple(options[number] for options, number in zip(tables, allocation.chosen, strict=True))
    assert needs(chosen) <= budget
    assert allocation.gap == 0
    least = min(sum(option.loss for option in choice) for choice in choices)
    assert sum(option.loss for option in chosen) == pytest.approx(least, abs=1e-11)
    assert allocation.loss == pytest.approx(least, abs=1e-11)


def test_the_maximum_with_the_best_bound_is_not_always_the_best() -> None:
    """Without transient bytes half of the large option would fit, and it is in whole ones that it does not."""
    options = [[Option(0, 0, 1.0), Option(10, 0, 0.0), Option(4, 1, 0.6)]]
    allocation = allocate(options, 5)
    assert allocation is not None
    assert allocation.chosen == (2,)


def test_bytes_of_real_sizes() -> None:
    """Losses of a millionth beside prices times budgets of gigabytes: rounding must prune nothing that wins."""
    scale = 10**9
    tables = [[Option(i * scale + i * i, i * 7, 1e-6 / (i + 1 + t / 3)) for i in range(6)] for t in range(5)]
    for budget in (3 * scale, 7 * scale + 60, 15 * scale):
        least = min(sum(o.loss for o in c) for c in itertools.product(*tables) if needs(c) <= budget)
        allocation = allocate(tables, budget)
        assert allocation is not None
        assert allocation.loss == pytest.approx(least, rel=1e-9)


def test_without_room_for_all_partial_choices_the_gap_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [[Option(i * i + t, 0, 1 / (i + 1) + 0.1 * ((i * (t + 3)) % 4)) for i in range(6)] for t in range(6)]
    best = allocate(tables, 60)
    monkeypatch.setattr(module, "MOST_STATES", 1)
    found = allocate(tables, 60)
    assert best is not None
    assert found is not None
    assert best.gap == 0
    assert found.loss > best.loss
    assert found.loss - found.gap <= best.loss
