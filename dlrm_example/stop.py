"""Stopping on request: schedulers send SIGTERM before they take a machine away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class StoppedError(Exception):
    """The run was asked to stop, and has saved a checkpoint."""


@dataclass
class StopRequest:
    """Whether this process has been asked to stop."""

    made: bool = False


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
