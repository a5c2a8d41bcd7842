"""Who is missing, once a collective has failed: gloo's errors name a socket, not a rank.

Every rank whose collective fails, and every rank that ends with an error of its own, leaves a word in the store through
which the ranks found each other. A rank that leaves none is hung, dead or cut off.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

logger = logging.getLogger(__name__)

WAITED = "waited"  # the word of a rank whose collective failed


class RanksLostError(RuntimeError):
    """A collective failed because other ranks did not take part in it."""


@dataclass(frozen=True)
class RollCall:
    """The ranks' last words; `patience` is how many seconds to wait for them."""

    store: dist.Store
    rank: int
    size: int
    patience: float

    @contextmanager
    def after_failures(self) -> Iterator[None]:
        """Turn the error of a collective into one that names the ranks missing; tell the others of any other error."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            if not _is_of_a_collective(error):
                self._say(f"{type(error).__name__}: {error}")
                raise
            logger.error("rank %d: a collective failed; looking for the other ranks", self.rank)
            self._say(WAITED)
            raise RanksLostError(f"rank {self.rank}: a collective failed ({error}): {self._report()}") from error

    def _say(self, word: str) -> None:
        try:
            self.store.set(str(self.rank), word)
        except RuntimeError:  # the store went with the node that held it
            logger.error("rank %d: the rendezvous store does not answer", self.rank)

    def _report(self) -> str:
        try:
            words = self._words()
        except RuntimeError as error:
            return f"nor does the store on the node of rank 0 answer ({error}), which is dead or cut off"
        missing = [rank for rank, word in words.items() if word is None]
        failed = [f"rank {rank} ended with {word}" for rank, word in words.items() if word not in (None, WAITED)]
        if missing:
            named = ", ".join(map(str, missing))
            silent = f"no sign of rank {named} of {self.size} within {self.patience:g} s: hung, dead or cut off"
            return "; ".join([*failed, silent])
        return "; ".join(failed) or "every rank waited for another: the network between them failed"

    def _words(self) -> dict[int, str | None]:
        """By rank, `None` for those that keep silent."""
        words: dict[int, str | None] = dict.fromkeys(range(self.size))
        deadline = time.monotonic() + self.patience
        while None in words.values():
            for rank in [rank for rank, word in words.items() if word is None]:
                if self.store.check([str(rank)]):
                    words[rank] = self.store.get(str(rank)).decode()
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return words


def _is_of_a_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
