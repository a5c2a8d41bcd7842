"""Ranks that are threads of this process."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_torchrec.recluster.collectives import Collectives


class ThreadCollectives(Collectives):
    """Ranks that are threads of this process; waiting for a rank that never comes is an error after some seconds."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._barrier, self._slots = barrier, slots

    def _gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        self._slots[self.rank] = tensor
        self._barrier.wait(timeout=20)
        shares = list(self._slots)
        self._barrier.wait(timeout=20)
        return lambda: shares

    def _sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        total = torch.stack(self._gather(tensor)()).sum(dim=0)
        return lambda: total

    def _all_to_all(
        self, rows: Tensor, lengths: list[int], received: Tensor, counts: list[int]
    ) -> Callable[[], Tensor]:
        parts = [of_rank[self.rank] for of_rank in self._gather(rows.split(lengths))()]  # type: ignore[arg-type]
        assert [len(part) for part in parts] == counts
        return lambda: torch.cat(parts)


def on_threads(world_size: int, work: Callable[[Collectives], Any]) -> list[Any]:
    """What ``work`` returned or raised on each rank."""
    barrier, slots, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCollectives(rank, barrier, slots))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
