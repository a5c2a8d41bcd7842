"""Ids beyond 2^31 on their way to the ranks that hold their assignments."""

import pytest
import torch
import torch.distributed as dist

from cce_torchrec.distributed.fetch import IdDist
from tests.distributed.harness import RankPool

V = 10**10
BLOCK = V // 2
EDGES = [0, 2**31 - 1, 2**31, 2**32 + 5, BLOCK - 1, BLOCK, BLOCK + 2**31, V - 1]


def asked_of(rank: int, world_size: int) -> tuple[list[int], list[int], list[int]]:
    """What a rank is asked for, and where in its own request each id stands."""
    assert dist.group.WORLD is not None
    id_dist = IdDist(dist.group.WORLD, torch.tensor([BLOCK]))
    ids_n = torch.tensor(EDGES if rank == 0 else EDGES[::-1])
    awaitable, places_n, asked_W = id_dist(["f"], [len(EDGES)], ids_n)
    return awaitable.wait().wait().values().tolist(), places_n.tolist(), asked_W.tolist()


@pytest.mark.distributed
def test_ids_reach_their_block(ranks2: RankPool) -> None:
    (low, places, asked), (high, _, asked_by_other) = ranks2.run(asked_of)
    assert low == EDGES[:5] + EDGES[4::-1]
    assert high == EDGES[5:] + EDGES[:4:-1]
    assert places == list(range(8))
    assert asked == asked_by_other == [5, 3]
