"""Fixtures for tests of several ranks."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import RankPool


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[RankPool]:
    """Four ranks on two hosts, as TorchRec understands it."""
    with RankPool(4, local_world_size=2) as pool:
        yield pool
