"""Prepared Parquet as batches of KeyedJaggedTensors, without ever being in memory as a whole.

`order.py` says which rows a batch has; here they are read, a block of row groups at a time, in a thread that is a
block ahead. Nothing is done row by row. To begin in the middle of an epoch, nothing before its block is read.

Shape suffixes: M rows of a block, P rows of this rank, F dense or one-hot features, B rows of a batch.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_example.data.dataset import PADDING
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import DataFile, Manifest
from dlrm_example.data.multi_hot import Lookups
from dlrm_example.data.order import Block, EpochOrder, batch_cuts
from dlrm_example.data.prefetch import prefetch
from dlrm_example.data.rows import Rows

BLOCKS_AHEAD, BATCHES_AHEAD = 1, 4


@dataclass(frozen=True, kw_only=True)
class StreamingLoader:
    """This rank's share of every global batch; what `InMemoryLoader` says of batches and ranks holds here too.

    Of a shuffled epoch's last batch, up to `world_size - 1` rows are left out, others in each epoch; where the number of
    ranks does not divide 2^6 x 3 x 5 x 7, of the other batches too. Unshuffled splits are padded instead.
    """

    folder: Path
    manifest: Manifest
    lookups: Mapping[str, Lookups]
    files: tuple[DataFile, ...]
    batch_size: int
    limit_batches: int | None = None
    shuffle_seed: int | None = None
    rank: int = 0
    world_size: int = 1

    def _cuts(self) -> np.ndarray:
        cuts = batch_cuts(sum(file.num_rows for file in self.files), self.batch_size * self.world_size)
        if self.shuffle_seed is not None and cuts[-1] - cuts[-2] < self.world_size:
            cuts = cuts[:-1]
        return cuts if self.limit_batches is None else cuts[: self.limit_batches + 1]

    def __len__(self) -> int:
        return len(self._cuts()) - 1

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        return prefetch(self._batches(number, start), BATCHES_AHEAD)

    def _batches(self, number: int, start: int) -> Generator[Batch]:
        cuts = self._cuts()[start:]
        with closing(prefetch(self._read_blocks(number, cuts), BLOCKS_AHEAD)) as blocks:
            waiting: list[Rows] = []
            for first, last in pairwise(cuts):
                wanted = len(self._mine(first, last))
                while sum(map(len, waiting)) < wanted:
                    waiting.append(next(blocks))
                rows = Rows.joined(waiting, self.manifest)
                waiting = [rows.part(wanted, len(rows))] if len(rows) > wanted else []
                share = -(-int(last - first) // self.world_size) if self.shuffle_seed is None else wanted
                batch = self._batch(rows.part(0, wanted), share - wanted)
                yield batch.pin_memory() if torch.cuda.is_available() else batch

    def _mine(self, first: int, last: int) -> np.ndarray:
        """This rank's positions of a batch."""
        if self.shuffle_seed is not None:
            last -= (last - first) % self.world_size
        return np.arange(first + self.rank, last, self.world_size)

    def _read_blocks(self, number: int, cuts: np.ndarray) -> Generator[Rows]:
        """This rank's rows of one block after the other, in the order of their positions."""
        order, groups = self._order(number), self._groups()
        for block in order.blocks():
            positions_P = self._mine_of(block, cuts)
            if len(positions_P):
                yield self._read(block, order.rows_at(block, positions_P), groups)

    def _groups(self) -> list[tuple[DataFile, int, int]]:
        """Every row group: its file, its number in it, and its rows."""
        return [(file, group, rows) for file in self.files for group, rows in enumerate(file.row_groups)]

    def _order(self, number: int) -> EpochOrder:
        return EpochOrder(
            group_rows=np.array([rows for _, _, rows in self._groups()]),
            seed=None if self.shuffle_seed is None else (self.shuffle_seed, number),
            world_size=self.world_size,
        )

    def position(self, number: int, batch: int) -> str:
        first, last = self._cuts()[batch : batch + 2]
        order, groups = self._order(number), self._groups()
        by_file: dict[str, list[int]] = {}
        for block in order.blocks():
            positions_P = np.arange(max(first, block.start), min(last, block.end))
            if len(positions_P):
                for place in np.unique(_group_of_row(order.rows_at(block, positions_P), block, groups)):
                    file, group, _ = groups[block.groups[place]]
                    by_file.setdefault(file.path, []).append(group)
        files = [f"{path} (row group {', '.join(map(str, sorted(found)))})" for path, found in sorted(by_file.items())]
        return f"batch {batch + 1} of {len(self)}: rows of {'; '.join(files)} in {self.folder}"

    def _mine_of(self, block: Block, cuts: np.ndarray) -> np.ndarray:
        """This rank's positions of a block, within those batches."""
        first = max(int(np.searchsorted(cuts, block.start, side="right")) - 1, 0)
        last = int(np.searchsorted(cuts, block.end))
        positions = [self._mine(*ends) for ends in pairwise(cuts[first : last + 1])]
        mine_P = np.concatenate([np.zeros(0, np.int64), *positions])
        return mine_P[(mine_P >= block.start) & (mine_P < block.end)]

    def _read(self, block: Block, rows_P: np.ndarray, groups: list[tuple[DataFile, int, int]]) -> Rows:
        """Those rows of the block, from the row groups that hold any of them."""
        starts = _starts(block, groups)
        group_of_row = _group_of_row(rows_P, block, groups)
        needed = np.unique(group_of_row)
        table = pa.concat_tables([self._read_group(*groups[block.groups[place]][:2]) for place in needed])
        moved = np.zeros(len(block.groups), np.int64)  # where a row of a group is now, less where it was
        moved[needed] = np.cumsum([0, *np.diff(starts)[needed]])[:-1] - starts[needed]
        return Rows.of_table(table, self.manifest, torch.from_numpy(rows_P + moved[group_of_row]))

    def _read_group(self, file: DataFile, group: int) -> pa.Table:
        manifest, path = self.manifest, self.folder / file.path
        columns = [manifest.label, *manifest.dense, *(column.name for column in manifest.sparse)]
        try:
            with pq.ParquetFile(path) as opened:
                return opened.read_row_group(group, columns=columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataUnavailableError(f"{path}, row group {group}: {error}") from None

    def _batch(self, rows: Rows, padding: int) -> Batch:
        """The rows, and some more of label `PADDING` with id 0 or none."""
        pad = torch.nn.functional.pad
        ids, lengths = zip(*self._ids_and_lengths(rows, padding), strict=True)
        sparse = KeyedJaggedTensor(
            keys=[column.name for column in self.manifest.sparse],
            values=torch.cat(ids).long(),
            lengths=torch.cat(lengths),
            stride=len(rows) + padding,
        )
        return Batch(pad(rows.dense_PF, (0, 0, 0, padding)), sparse, pad(rows.labels_P, (0, padding), value=PADDING))

    def _ids_and_lengths(self, rows: Rows, padding: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of one column after the other; the padding's rows have id 0 where every other row has one id, else none."""
        pad, one_hot = torch.nn.functional.pad, len(rows.one_hot_FP)
        for number, column in enumerate(self.manifest.sparse):
            jagged = None if number < one_hot else rows.multi_hot[number - one_hot]
            ids = rows.one_hot_FP[number] if jagged is None else jagged.values_T
            lookups = self.lookups.get(column.name)
            if lookups is not None:
                ids = lookups.of(ids)
            if jagged is not None:
                yield ids, pad(jagged.offsets_N1.diff(), (0, padding)).int()
            elif lookups is None or lookups.size == 1:
                yield pad(ids, (0, padding)), torch.ones(len(rows) + padding, dtype=torch.int32)
            else:
                yield ids, pad(torch.full((len(rows),), lookups.size, dtype=torch.int32), (0, padding))


def _starts(block: Block, groups: list[tuple[DataFile, int, int]]) -> np.ndarray:
    """The first row of each of the block's groups, counted over the block, and its end."""
    return np.cumsum([0, *(groups[group][2] for group in block.groups)])


def _group_of_row(rows_P: np.ndarray, block: Block, groups: list[tuple[DataFile, int, int]]) -> np.ndarray:
    """Which of the block's groups each row is in."""
    return np.searchsorted(_starts(block, groups), rows_P, side="right") - 1
