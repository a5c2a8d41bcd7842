"""Work done ahead, in a thread of its own."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")
_LOOK_SECONDS = 0.1  # between looks at whether anybody still waits


def prefetch(items: Generator[T], ahead: int) -> Generator[T]:
    """The items; up to `ahead` of them are made while the caller works. An error comes where its item would have.

    The thread ends with the items, or when this iterator is closed.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    closed = threading.Event()

    def give(item: T | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=_LOOK_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    give(item, None)
                    if closed.is_set():
                        return
            give(None, StopIteration())
        except BaseException as error:
            give(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
