"""Every method: fields that the caller fixes are kept, and what a budget cannot hold with them is said exactly."""

import dataclasses
import re
from typing import Any

import pytest

from cce_torchrec import CCE, QR
from cce_torchrec.methods import MethodConfig
from tests.contract.cases import VARIANTS, Variant

V, D = 50, 8


def sizes(variant: Variant) -> list[str]:
    """The fields that say how many of something there are."""
    return [field.name for field in dataclasses.fields(variant.method) if field.name.startswith("num_")]


CASES = [(variant, name, value) for variant in VARIANTS for name in sizes(variant) for value in (1, 2, 7, 20)]


@pytest.mark.parametrize("budget", [0, 40, 100, 200, 333, 1000])
@pytest.mark.parametrize(("variant", "name", "value"), CASES, ids=str)
def test_a_fixed_size_is_kept_or_the_budget_that_it_needs_is_named(
    variant: Variant, name: str, value: int, budget: int
) -> None:
    fixed: dict[str, Any] = variant.overrides | {name: value}
    no_room = variant.overrides.get("concat_weights", False) and name == "num_hashes" and value >= D
    no_room |= name == "num_assigned_ids" and value < variant.overrides.get("num_hot_ids", 0)
    if no_room or (name == "num_columns" and D % value) or (name == "num_levels" and value < 2):
        with pytest.raises(ValueError, match=f"{name}={value} "):
            variant.method.from_budget(V, D, 1000, **fixed)
        return
    try:
        method: MethodConfig = variant.method.from_budget(V, D, budget, **fixed)
    except ValueError as error:
        named = _named_budget(str(error), budget)
        assert named > budget
        assert variant.method.from_budget(V, D, named, **fixed).num_params(V, D) <= named
        with pytest.raises(ValueError, match=rf"\b{named}\b"):
            variant.method.from_budget(V, D, named - 1, **fixed)
    else:
        assert getattr(method, name) == value
        assert method.num_params(V, D) <= budget


def _named_budget(message: str, budget: int) -> int:
    """The number that the message offers instead of ``budget``."""
    match = re.search(r"smallest possible is (\d+)|needs (\d+) parameters", message)
    assert match is not None, f"no budget is named in {message!r} (budget {budget})"
    return int(match[1] or match[2])


def test_cce_helpers_fill_what_fixed_main_rows_leave() -> None:
    assert CCE.from_budget(V, D, 12 * D, num_rows=10) == CCE(num_rows=10, num_helper_rows=2, num_columns=2)
    assert CCE.from_budget(V, D, 12 * D, num_rows=2) == CCE(num_rows=2, num_helper_rows=10, num_columns=2)


def test_cce_main_rows_fill_what_fixed_helpers_leave() -> None:
    assert CCE.from_budget(V, D, 12 * D, num_helper_rows=3) == CCE(num_rows=9, num_helper_rows=3, num_columns=2)
    method = CCE.from_budget(V, D, 12 * D, num_helper_rows=3, num_hot_ids=2)
    assert method == CCE(num_rows=7, num_helper_rows=3, num_hot_ids=2, num_columns=2)


def test_concatenated_qr_of_one_dim() -> None:
    with pytest.raises(ValueError, match="embedding_dim=1 "):
        QR.from_budget(V, 1, 1000, operation="concat")
