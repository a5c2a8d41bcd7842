"""Stopping on request: schedulers send SIGTERM before they take a machine away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from dlrm_example.distributed import World


class StoppedError(Exception):
    """The run was asked to stop, and has saved a checkpoint."""


@dataclass
class StopRequest:
    """Whether this process has been asked to stop."""

    made: bool = False


class StopVote:
    """Whether any rank was asked to stop: all ranks learn of it in the same step, without waiting for their devices.

    Where there are several, each step begins a sum over the CPU's network and ends that of the step before.
    """

    def __init__(self, request: StopRequest, world: World, timeout: float) -> None:
        """Collective; `timeout` is how many seconds to wait for the other ranks."""
        self._request = request
        wait = timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=wait) if world.size > 1 else None
        self._votes = torch.zeros(1)
        self._counting: dist.Work | None = None

    def passed(self) -> bool:
        """Collective; to be asked once a step."""
        if self._group is None:
            return self._request.made
        if self._counting is not None:
            self._counting.wait()
        stop = bool(self._votes)
        self._votes = torch.tensor([float(self._request.made)])
        self._counting = dist.all_reduce(self._votes, group=self._group, async_op=True)
        return stop


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM makes a request instead of ending the process; what it did before is restored at the end."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.made = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
