"""Loaders of different lengths: ranks agree on when the last part of the training begins, or one would wait for the other."""

import pytest

from cce_torchrec import CompressionRule, ReclusterSchedule
from cce_torchrec.swap.config import SwapConfig
from cce_torchrec.swap.epochs import Epochs
from cce_torchrec.swap.patches import Swap, _Reclusterer
from tests.distributed.harness import RankPool


def late_steps(rank: int, world_size: int) -> list[int]:
    schedule = ReclusterSchedule(total_steps=None, every_steps=1, stop_after_fraction=0.5)
    swap = Swap(SwapConfig(rules=(CompressionRule(method="cce", compression=2),), schedule=schedule))
    reclusterer = _Reclusterer(schedule, Epochs(None), swap)
    reclusterer.begin_epoch(10 if rank == 0 else 14)
    found = []
    for step in range(1, 9):
        reclusterer._completed = step
        if reclusterer._is_late():
            found.append(step)
    return found


@pytest.mark.distributed
def test_ranks_agree(ranks2: RankPool) -> None:
    assert ranks2.run(late_steps) == [[6, 7, 8], [6, 7, 8]]
