"""The few collectives a re-clustering needs, as an object that is passed in.

The maths calls ``collectives.all_reduce_sum(...)`` and is the same code on one process and on many; this file is the only
place of the re-clustering that knows ``torch.distributed``. Every method is collective: all ranks call it, in the same
order. Each begins with two numbers of every rank, which say what it is about to send or that it has failed. So in a ``with
collectives.one_fails_all_fail():`` block, where one rank raises all do, and none is left waiting for another. A sum travels
beside these numbers, without waiting for them; a rank that has failed reads there that it is expected, and sends zeros.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

Result = TypeVar("Result")
_LONGEST_MESSAGE = 2000
_FAILED = -1
_EXCHANGED_BYTES = 2**22  # of what is exchanged, a copy for every rank
_NO_SUM = 0
_SUMMED = (None, torch.float64, torch.float32, torch.int64)  # dtypes, by the number that tells them


class Collectives(ABC):
    """What the re-clustering may ask of the other ranks. Subclass it to plug in another transport."""

    rank: int = 0
    world_size: int = 1
    has_failed: bool = False  # whether an agreement has already told every rank of a failure

    @abstractmethod
    def _sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin the sum of every rank's flat ``tensor``, of the same length and dtype; a function that waits for it.

        Sums are not in place, and on the device of ``tensor``.
        """

    @abstractmethod
    def _gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        """Begin to gather every rank's ``tensor``, of the same shape and dtype; a function that waits for all, by rank."""

    @abstractmethod
    def _all_to_all(
        self, rows: Tensor, lengths: list[int], received: Tensor, counts: list[int]
    ) -> Callable[[], Tensor]:
        """Begin to give each rank the next of some rows; a function that waits for what all have given this one, by rank.

        Args:
            rows: on any device, [sum(lengths), ...].
            lengths: how many each rank is given.
            received: room for what this one is given, on that device, [sum(counts), ...].
            counts: how many each rank gives to this one.
        """

    def alone(self) -> "Collectives":
        """For work of this rank that no other has a part in."""
        return LocalCollectives()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor`` (same shape on all ranks, float64, float32 or int64), new, on its device."""
        headers = self._gather(torch.tensor([tensor.numel(), _SUMMED.index(tensor.dtype)]))
        total = self._sum(tensor.detach().reshape(-1))
        told, summed = headers(), total()
        self._counts(told)
        return summed.view(tensor.shape)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Every rank's ``tensor`` concatenated along dim 0 in rank order; dim 0 may differ and may be 0."""
        counts = self._counts(self._gather(torch.tensor([len(tensor), _NO_SUM]))())
        return self._gather_rows(tensor.detach(), counts)

    def exchange_rows(self, for_ranks: Sequence[Tensor]) -> Tensor:
        """What every rank has for this one, concatenated along dim 0 in rank order; each passes a tensor for every rank."""
        lengths, rows = [len(rows) for rows in for_ranks], torch.cat([rows.detach() for rows in for_ranks])
        if max(self._counts(self._gather(torch.tensor([len(rows), _NO_SUM]))())) == 0:
            return rows
        ones = [1] * self.world_size
        counts = self._all_to_all(torch.tensor(lengths), ones, torch.tensor(lengths), ones)().tolist()
        error: Exception | None = None
        try:
            received = _room_for(rows, sum(counts))
        except Exception as raised:
            error = raised
        self.agree(error)  # it may be too much for a rank's memory
        return self._all_to_all(rows, lengths, received, counts)()

    def is_mine(self, number: int) -> bool:
        """Whether this rank is the one to do a piece of work for all ranks, of several that are numbered."""
        return number % self.world_size == self.rank

    def agree(self, error: Exception | None = None) -> None:
        """Tell every rank whether any rank failed, and raise the same error on all of them if so.

        Args:
            error: what this rank's local work raised, or None where it went well.

        Raises:
            RuntimeError: on every rank, naming the ranks that failed and why; this rank's own error is its cause.
            Exception: ``error`` itself where every rank failed, as on bad input that all of them see.
        """
        self._counts(self._gather(torch.tensor([0 if error is None else _FAILED, _NO_SUM]))(), error)

    def _counts(self, headers: list[Tensor], error: Exception | None = None) -> list[int]:
        """Every rank's count, unless one has failed: then as :meth:`agree`."""
        counts, kinds = torch.stack(headers).T.tolist()
        if min(counts) != _FAILED:
            return list(counts)
        self.has_failed = True
        if max(counts) == _FAILED and error is not None:
            raise error
        if error is not None and max(kinds) != _NO_SUM:  # the others are in the middle of a sum
            self._sum(torch.zeros(max(counts), dtype=_SUMMED[max(kinds)]))()
        text = "" if error is None else f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
        lengths = torch.cat(self._gather(torch.tensor([len(text)]))()).tolist()
        letters_L2 = torch.tensor([[self.rank, ord(letter)] for letter in text], dtype=torch.int64).view(-1, 2)
        messages: dict[int, str] = {}
        for rank, letter in self._gather_rows(letters_L2, lengths).tolist():
            messages[rank] = messages.get(rank, "") + chr(letter)
        reasons = "; ".join(f"rank {rank}: {message}" for rank, message in sorted(messages.items()))
        raise RuntimeError(f"failed on {len(messages)} of {self.world_size} ranks: {reasons}") from error

    def _gather_rows(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Every rank's rows, given how many each has: they travel padded to the longest share."""
        longest = max(counts)
        if longest == 0:
            return tensor.clone()
        if len(tensor) < longest:
            tensor = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        shares = [share[:count] for share, count in zip(self._gather(tensor)(), counts, strict=True)]
        return shares[0] if len(shares) == 1 else torch.cat(shares)

    @contextmanager
    def one_fails_all_fail(self) -> Iterator[None]:
        """Run work that calls collectives; where it raises on one rank, it raises on all, at their next collective.

        The ranks that did not fail notice because every collective begins with what each is about to do; at the end of the
        block all ranks agree once more, so what follows it happens on all or on none.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.has_failed:
                raise
            error = raised
        self.agree(error)


class LocalCollectives(Collectives):
    """One process, nobody to talk to: sums and gathers return their input."""

    def _sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def _gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: [tensor]

    def _all_to_all(
        self, rows: Tensor, lengths: list[int], received: Tensor, counts: list[int]
    ) -> Callable[[], Tensor]:
        return lambda: rows


class ProcessGroupCollectives(Collectives):
    """Collectives over a ``torch.distributed`` process group; gloo and NCCL alike.

    Over gloo, ranks exchange messages of up to 4 MiB directly, all with all: its ``all_gather`` and ``all_reduce`` pass them
    from rank to rank, which takes longer.

    Args:
        process_group: the ranks that re-cluster together; None is the default group.
        device: where the backend wants its tensors. Default: the current CUDA device for NCCL, else the CPU. Tensors
            from elsewhere are copied there and the result is copied back.
    """

    def __init__(self, process_group: Any = None, device: torch.device | str | None = None) -> None:
        self._group = process_group
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        nccl = "nccl" in dist.get_backend(process_group)
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._device = torch.device(device)
        self._exchanged_bytes = 0 if nccl else _EXCHANGED_BYTES

    def _sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._is_exchanged(tensor, copies=1):
            return self._sum_by_exchanges(tensor)
        total = tensor.to(self._device, copy=True, memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, group=self._group, async_op=True)
        return _when_done(work, lambda: total.to(tensor.device))

    def _gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        mine = tensor.to(self._device).contiguous()
        if self._is_exchanged(tensor, copies=self.world_size):
            received = self._tell_all(mine)
            return lambda: [share.to(tensor.device) for share in received()]
        shares = [torch.empty_like(mine) for _ in range(self.world_size)]
        work = dist.all_gather(shares, mine, group=self._group, async_op=True)
        return _when_done(work, lambda: [share.to(tensor.device) for share in shares])

    def _all_to_all(
        self, rows: Tensor, lengths: list[int], received: Tensor, counts: list[int]
    ) -> Callable[[], Tensor]:
        mine, theirs = rows.to(self._device).contiguous(), received.to(self._device)
        work = dist.all_to_all_single(theirs, mine, counts, lengths, group=self._group, async_op=True)
        return _when_done(work, lambda: theirs.to(rows.device))

    def _is_exchanged(self, tensor: Tensor, copies: int) -> bool:
        return copies * tensor.numel() * tensor.element_size() <= self._exchanged_bytes

    def _sum_by_exchanges(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Each rank adds up a part, and gives the sum to all."""
        ranks = self.world_size
        size = -(-len(tensor) // ranks)
        padded = pad(tensor.to(self._device), (0, size * ranks - len(tensor)))
        received = self._all_to_all(padded, [size] * ranks, torch.empty_like(padded), [size] * ranks)
        return lambda: (
            self._tell_all(received().view(ranks, size).sum(dim=0))().view(-1)[: len(tensor)].to(tensor.device)
        )

    def _tell_all(self, mine: Tensor) -> Callable[[], Tensor]:
        """Begin to give every rank the same; a function that waits for what they gave this one, by rank."""
        ones, for_ranks = [1] * self.world_size, torch.stack([mine] * self.world_size)
        return self._all_to_all(for_ranks, ones, torch.empty_like(for_ranks), ones)


def _room_for(rows: Tensor, count: int) -> Tensor:
    """For so many like them."""
    return rows.new_empty(count, *rows.shape[1:])


def _when_done(work: Any, result: Callable[[], Result]) -> Callable[[], Result]:
    """A function that waits for a collective and returns what came of it."""

    def wait() -> Result:
        work.wait()
        return result()

    return wait
