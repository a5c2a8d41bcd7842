"""How long a script trains, as far as it shows: by the lengths of the ``DataLoader`` s that it trains on."""


class Epochs:
    """The part of the training, or of the epoch, that is over.

    Args:
        count: how many epochs the script trains; ``None`` where that is not known: then each may be the last.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._start: int | None = None
        self._length: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether the length of an epoch is."""
        return self._length is not None

    def begin(self, length: int | None, completed_steps: int) -> None:
        """A loader is iterated to train on.

        Args:
            length: batches it will give; ``None`` where it cannot tell: then it is as long as the one before.
            completed_steps: of the training so far.
        """
        self._length = completed_steps - self._start if length is None and self._start is not None else length
        self._start = completed_steps

    def is_late(self, completed_steps: int, fraction: float) -> bool:
        """Whether more than ``fraction`` is over: of all epochs where their number is known, else of this one.

        Example:
            >>> epochs = Epochs(None)
            >>> epochs.begin(10, completed_steps=30)
            >>> epochs.is_late(38, 0.8), epochs.is_late(39, 0.8)
            (False, True)
        """
        if self._length is None or self._start is None:
            return False
        if self._count is None:
            over = completed_steps - self._start or self._length  # its first batch is asked for: the one before is over
            return over > _part(self._length, fraction)
        return completed_steps > _part(self._length * self._count, fraction)


def _part(steps: int, fraction: float) -> int:
    return int(round(steps * fraction, 6))  # 0.29 * 100 is 28.999999999999996
