"""Fixtures and settings that all tests share."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.distributed.harness import RankPool

# Times vary a lot on a shared machine, so examples have no deadline. CI draws the same examples every time.
hypothesis.settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two ranks that live as long as the test session: ``ranks2.run(fn, *args)``."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four ranks that live as long as the test session: ``ranks4.run(fn, *args)``."""
    with RankPool(4) as pool:
        yield pool
