"""The few collectives a re-clustering needs, as an object that is passed in.

The maths calls ``collectives.all_reduce_sum(...)`` and is the same code on one process and on many; this file is the only
place of the re-clustering that knows ``torch.distributed``. Every method is collective: all ranks call it, in the same
order. Each begins with one number of every rank, which says how many rows it has or that it has failed. So in a ``with
collectives.one_fails_all_fail():`` block, where one rank raises all do, and none is left waiting for another.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LONGEST_MESSAGE = 2000
_FAILED = -1


class Collectives(ABC):
    """What the re-clustering may ask of the other ranks. Subclass it to plug in another transport."""

    rank: int = 0
    world_size: int = 1
    has_failed: bool = False  # whether an agreement has already told every rank of a failure

    @abstractmethod
    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor``, on its device; not in place. All have the same shape and dtype."""

    @abstractmethod
    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor``, in rank order, on its device. All have the same shape and dtype."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor`` (same shape and dtype on all ranks), as a new tensor on its device."""
        self.agree()
        return self._sum(tensor.detach())

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Every rank's ``tensor`` concatenated along dim 0 in rank order; dim 0 may differ and may be 0."""
        counts = self._announce(len(tensor))
        return self._gather_rows(tensor.detach(), counts)

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
        self._announce(0, error)

    def _announce(self, count: int, error: Exception | None = None) -> list[int]:
        """Every rank's count, unless one has failed: then as :meth:`agree`."""
        number = torch.tensor([count if error is None else _FAILED])
        counts: list[int] = torch.cat(self._gather(number)).tolist()
        if min(counts) != _FAILED:
            return counts
        self.has_failed = True
        if max(counts) == _FAILED and error is not None:
            raise error
        text = "" if error is None else f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
        lengths = torch.cat(self._gather(torch.tensor([len(text)]))).tolist()
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
        shares = [share[:count] for share, count in zip(self._gather(tensor), counts, strict=True)]
        return shares[0] if len(shares) == 1 else torch.cat(shares)

    @contextmanager
    def one_fails_all_fail(self) -> Iterator[None]:
        """Run work that calls collectives; where it raises on one rank, it raises on all, at their next collective.

        The ranks that did not fail notice because every collective begins with :meth:`agree`; at the end of the block all
        ranks agree once more, so what follows it happens on all or on none.
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

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


class ProcessGroupCollectives(Collectives):
    """Collectives over a ``torch.distributed`` process group; gloo and NCCL alike.

    Args:
        process_group: the ranks that re-cluster together; None is the default group.
        device: where the backend wants its tensors. Default: the current CUDA device for NCCL, else the CPU. Tensors
            from elsewhere are copied there and the result is copied back.
    """

    def __init__(self, process_group: Any = None, device: torch.device | str | None = None) -> None:
        self._group = process_group
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        if device is None:
            nccl = "nccl" in dist.get_backend(process_group)
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._device = torch.device(device)

    def _sum(self, tensor: Tensor) -> Tensor:
        total = tensor.to(self._device, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        mine = tensor.to(self._device).contiguous()
        shares = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(shares, mine, group=self._group)
        return [share.to(tensor.device) for share in shares]
