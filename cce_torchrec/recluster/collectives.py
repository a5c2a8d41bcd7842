"""The few collectives a re-clustering needs, as an object that is passed in.

The maths calls ``collectives.all_reduce_sum(...)`` and is the same code on one process and on many; this file is the only
place of the re-clustering that knows ``torch.distributed``. Every method is collective: all ranks call it, in the same
order. Work that may fail on one rank alone goes in a ``with collectives.guard():`` block, after which either every rank
goes on or every rank raises, so that no rank is left waiting in a collective that another one never reaches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LONGEST_MESSAGE = 2000


class Collectives(ABC):
    """What the re-clustering may ask of the other ranks. Subclass it to plug in another transport."""

    rank: int = 0
    world_size: int = 1
    has_failed: bool = False  # whether an agreement has already told every rank of a failure

    @abstractmethod
    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor`` (same shape and dtype on all ranks), as a new tensor on its device."""

    @abstractmethod
    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Every rank's ``tensor`` concatenated along dim 0 in rank order; dim 0 may differ and may be 0."""

    def agree(self, error: Exception | None = None) -> None:
        """Tell every rank whether any rank failed, and raise the same error on all of them if so.

        Args:
            error: what this rank's local work raised, or None where it went well.

        Raises:
            RuntimeError: on every rank, naming the ranks that failed and why; this rank's own error is its cause.
            Exception: ``error`` itself where every rank failed, as on bad input that all of them see.
        """
        failed = int(self.all_reduce_sum(torch.tensor([0 if error is None else 1])))
        if failed == 0:
            return
        self.has_failed = True
        if failed == self.world_size and error is not None:
            raise error
        text = "" if error is None else f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
        letters = torch.tensor([[self.rank, ord(letter)] for letter in text], dtype=torch.int64).reshape(-1, 2)
        messages: dict[int, str] = {}
        for rank, letter in self.all_gather_rows(letters).tolist():
            messages[rank] = messages.get(rank, "") + chr(letter)
        reasons = "; ".join(f"rank {rank}: {message}" for rank, message in sorted(messages.items()))
        raise RuntimeError(f"failed on {len(messages)} of {self.world_size} ranks: {reasons}") from error

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run local work, then :meth:`agree` on how it went. The block itself must not call a collective.

        Example:
            >>> with LocalCollectives().guard():
            ...     rows = [1, 2, 3]
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # whatever it is, the other ranks must hear of it
            error = raised
        self.agree(error)

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

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


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
        self._is_agreeing = False

    def agree(self, error: Exception | None = None) -> None:
        """As the base class's; the collectives it calls do not agree in their turn."""
        self._is_agreeing = True
        try:
            super().agree(error)
        finally:
            self._is_agreeing = False

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor``, on the device of this rank's."""
        self._agree_first()
        total = tensor.detach().to(self._device, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Every rank's rows in rank order: the sizes first, then the rows padded to the longest share."""
        self._agree_first()
        local = tensor.detach().to(self._device).contiguous()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([local.shape[0]], device=self._device), group=self._group)
        counts = [int(size) for size in sizes]
        longest = max(counts)
        if longest == 0:
            return tensor.detach().clone()
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
        shares = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(shares, padded, group=self._group)
        return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)]).to(tensor.device)

    def _agree_first(self) -> None:
        """Hear of a rank that failed where it will never reach the collective that this one is about to call."""
        if not self._is_agreeing:
            self.agree()
