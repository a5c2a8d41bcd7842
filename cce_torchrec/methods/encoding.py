"""How the assignments of an id are stored: as integers or as bits.

What is stored of an id is a row of numbers of its own, so blocks of ids, checkpoints and transfers need not know which.

Shapes: N ids of a batch, A assignments an id, W numbers stored an id.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def smallest_int_dtype(num_values: int) -> torch.dtype:
    """The narrowest integer type that holds 0 .. ``num_values - 1``."""
    for dtype in (torch.uint8, torch.int16):
        if num_values - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


class Encoding(ABC):
    """How the A assignments of an id become W stored numbers; ids do not share any, so both go id by id.

    Attributes:
        dtype: of the stored numbers.
        width: W.
        bits: of an assignment, where it is not a number of its own; else 0.
    """

    dtype: torch.dtype
    width: int
    bits: int = 0

    @abstractmethod
    def encode(self, assignments_NA: Tensor) -> Tensor:
        """Any integers [N, A] to what is stored, [N, W]."""

    @abstractmethod
    def decode(self, stored_NW: Tensor) -> Tensor:
        """Back to [N, A], of the narrowest integer type that holds them."""


class PlainEncoding(Encoding):
    """An integer an assignment, of the narrowest type."""

    def __init__(self, num_values: int, count: int) -> None:
        self.dtype, self.width = smallest_int_dtype(num_values), count

    def encode(self, assignments_NA: Tensor) -> Tensor:
        return assignments_NA.to(self.dtype)

    def decode(self, stored_NW: Tensor) -> Tensor:
        return stored_NW


class PackedEncoding(Encoding):
    """ceil(log2 k) bits an assignment, lowest bits first, filled up to a whole byte an id."""

    dtype = torch.uint8

    def __init__(self, num_values: int, count: int) -> None:
        self.bits = max(1, (num_values - 1).bit_length())
        self.width = -(-count * self.bits // 8)
        self._decoded = smallest_int_dtype(num_values)
        self._count = count
        self._bytes = -(-(7 + self.bits) // 8)  # over how many an assignment may lie

    def encode(self, assignments_NA: Tensor) -> Tensor:
        stored_NW = torch.zeros(len(assignments_NA), self.width, dtype=torch.uint8, device=assignments_NA.device)
        for index in range(self._count):
            first = index * self.bits
            bits_N = assignments_NA[:, index].to(torch.int64) << first % 8
            for place in range(first // 8, min(first // 8 + self._bytes, self.width)):
                stored_NW[:, place] |= (bits_N & 255).to(torch.uint8)
                bits_N >>= 8
        return stored_NW

    def decode(self, stored_NW: Tensor) -> Tensor:
        first_A = torch.arange(self._count, device=stored_NW.device) * self.bits
        words_NA = torch.zeros(len(stored_NW), self._count, dtype=torch.int64, device=stored_NW.device)
        for byte in range(self._bytes):
            # Beyond the last byte there are only bits that the mask leaves out.
            places_A = (first_A // 8 + byte).clamp(max=self.width - 1)
            words_NA |= stored_NW.index_select(1, places_A).to(torch.int64) << 8 * byte
        return ((words_NA >> first_A % 8) & ((1 << self.bits) - 1)).to(self._decoded)
