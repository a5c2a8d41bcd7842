"""Every method in processes of their own: memory does not grow with V, and results do not depend on the process."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.contract.cases import VARIANTS, Variant
from tests.contract.in_a_process import DIM, MANY, digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # a process measures all methods for the first test of each kind

every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def measured(what: str, hash_seed: str = "0") -> dict[str, Any]:
    """By variant."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.contract.in_a_process", what]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    return measured("peaks")


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    return measured("digests", hash_seed="7")


@every_method
def test_memory_of_a_step_does_not_grow_with_the_ids_of_the_table(variant: Variant, peaks: dict[str, int]) -> None:
    """Ten million ids; what the table itself stores is not counted."""
    if variant.key == "full":  # ... for which it does, or the measure is wrong
        assert peaks["full"] > MANY // 10 * DIM * 4
    else:
        assert 0 < peaks[str(variant)] < MANY, "a byte an id"


@every_method
def test_another_process_computes_the_same(variant: Variant, digests: dict[str, str]) -> None:
    assert digests[str(variant)] == digest(variant)
