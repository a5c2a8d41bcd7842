"""What the steps of a preparation share: rows that cannot be used, and work done on all cores with bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from tqdm import tqdm

from dlrm_example.data.download import DataUnavailableError

T = TypeVar("T")


class BadRows:
    """Counts malformed lines and rows without a label of 0 or 1, and ends the preparation where there are too many."""

    SHOWN: ClassVar[int] = 5

    def __init__(self, limit: int) -> None:
        self.count, self.examples, self._limit, self._lock = 0, list[str](), limit, threading.Lock()

    def add(self, count: int, examples: Sequence[str]) -> None:
        """Raise a `DataUnavailableError` where that makes more than the limit."""
        with self._lock:
            self.count += count
            self.examples = [*self.examples, *examples][: self.SHOWN]
        if self.count > self._limit:
            raise DataUnavailableError(
                f"{self.count} malformed lines or rows are more than --max_bad_lines {self._limit}, such as\n  "
                + "\n  ".join(self.examples)
            )


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """What the jobs return, in their order; at most `ahead` of them wait or run."""
    running: deque[Future[T]] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(job))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


@contextmanager
def rows_bar(title: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A bar with rows a second, on a terminal only; what it gives is called with the number of rows that are done."""
    with tqdm(desc=title, total=total, unit=" rows", unit_scale=True, disable=None) as bar:
        yield bar.update
