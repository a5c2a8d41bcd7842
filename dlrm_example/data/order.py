"""The order of an epoch's rows, as a function of the seed and the epoch alone, and which of them a rank has to read.

Row groups, shuffled, are cut into *blocks* of some hundred thousand rows. The epoch is one block after the other, and
within a block the rows are shuffled. A rank takes every `world_size`-th position, so the rows of a step are the same ones
on any number of ranks. Still a rank need not read all row groups: position t takes its row from *lane* t modulo the number
of lanes, a lane being a run of consecutive rows of the block, and the lanes of one rank lie side by side.

Shape suffixes: M rows of a block, P positions, K1 cuts between K batches, L lanes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

BLOCK_ROWS = 1 << 18
LANES = 64  # so that up to as many ranks, their number being a power of two, read nothing twice
MANY_RANKS = 2**6 * 3 * 5 * 7  # sizes of batches are multiples of what this shares with the rows a step


@dataclass(frozen=True)
class Block:
    """Some row groups that are read, and shuffled, together; `start` is the position of the first row in the epoch."""

    number: int
    start: int
    groups: np.ndarray
    num_rows: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """Where every row of an epoch is; in order of the files if there is no seed.

    Args:
        group_rows: rows of every row group.
        seed: of the shuffling, the epoch's number included; None for none.
        world_size: has no influence on a shuffled order.
    """

    group_rows: np.ndarray
    seed: tuple[int, int] | None
    world_size: int

    def blocks(self) -> Iterator[Block]:
        order = np.arange(len(self.group_rows))
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(order)
        ends = np.cumsum(self.group_rows[order])
        first, start, number = 0, 0, 0
        while first < len(order):
            last = min(int(np.searchsorted(ends, start + BLOCK_ROWS)), len(order) - 1)
            yield Block(number, start, order[first : last + 1], int(ends[last]) - start)
            first, start, number = last + 1, int(ends[last]), number + 1

    def rows_at(self, block: Block, positions_P: np.ndarray) -> np.ndarray:
        """Which row of the block, counted over its groups one after the other, is at each of the epoch's positions."""
        positions_M = np.arange(block.start, block.end)
        if self.seed is None:
            lanes_M = positions_M % self.world_size
            by_row = np.argsort(lanes_M, kind="stable")
        else:
            lanes_M = _LANE_OF_RESIDUE[positions_M % LANES]
            by_row = np.argsort(lanes_M + np.random.default_rng([*self.seed, block.number]).random(block.num_rows))
        row_of_position = np.empty(block.num_rows, np.int64)
        row_of_position[by_row] = np.arange(block.num_rows)
        return row_of_position[positions_P - block.start]


def _reversed_bits() -> np.ndarray:
    """Residues that are the same modulo a power of two get neighbouring lanes."""
    bits = LANES.bit_length() - 1
    return np.array([int(f"{residue:0{bits}b}"[::-1], 2) for residue in range(LANES)])


_LANE_OF_RESIDUE = _reversed_bits()


def batch_cuts(num_rows: int, rows_a_step: int) -> np.ndarray:
    """Positions between batches of nearly one size, at most `rows_a_step`; all but the last can be dealt out evenly."""
    unit = gcd(rows_a_step, MANY_RANKS)
    num_batches, num_units = -(-num_rows // rows_a_step), -(-num_rows // unit)
    return np.minimum(np.arange(num_batches + 1) * num_units // max(num_batches, 1) * unit, num_rows)
