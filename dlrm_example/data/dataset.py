"""What a data set is to the training code: its features (`DatasetInfo`) and a loader of TorchRec batches a split.

Nothing here knows about MovieLens. A source that does not fit in memory need only implement `Dataset`.

Shape suffixes: N rows of a split, B rows of a batch, F dense features, T total ids.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torchrec.datasets.utils import Batch

SPLITS = ("train", "val", "test")
PADDING = -1  # the label of rows that are only there to make batches of all ranks equally long


@dataclass(frozen=True, kw_only=True)
class SparseFeature:
    """One categorical field and the table it looks up; a multi-hot one has any number of ids a row."""

    name: str
    num_embeddings: int
    multi_hot: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Everything the model must know of the data.

    `count_lookups` reads, where the data has it, how often each id of each sparse feature is looked up in an epoch.
    """

    name: str
    sparse_features: tuple[SparseFeature, ...]
    dense_names: tuple[str, ...]
    count_lookups: Callable[[], dict[str, np.ndarray]] | None = None


@dataclass(frozen=True, kw_only=True)
class ColumnChoice:
    """Columns of a data set that names them freely, and what its ids look up; None for what it has.

    `num_embeddings` and `multi_hot_sizes` have a number for each sparse column, in the order of `sparse`.
    """

    label: str | None = None
    dense: tuple[str, ...] | None = None
    sparse: tuple[str, ...] | None = None
    num_embeddings: tuple[int, ...] | None = None
    multi_hot_sizes: tuple[int, ...] | None = None
    multi_hot_distribution: Literal["uniform", "pareto"] = "uniform"


class BatchLoader(Protocol):
    """The batches of one split on one rank; every rank has as many, as long, and those of val and test may be padded."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` from batch `start` on: the same ones whenever it is asked for the same epoch."""
        ...

    def position(self, number: int, batch: int) -> str:
        """Where the rows of a batch of epoch `number`, over all ranks, are found in the data, in words."""
        ...


class Dataset(Protocol):
    """A named set of splits."""

    @property
    def info(self) -> DatasetInfo: ...

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        limit_batches: int | None = None,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> BatchLoader:
        """Batches of at most `batch_size` rows a rank, in order, or in another one every epoch."""
        ...


@dataclass(frozen=True)
class JaggedIds:
    """The ids of one feature: those of row n are `values_T[offsets_N1[n] : offsets_N1[n + 1]]`."""

    values_T: torch.Tensor
    offsets_N1: torch.Tensor

    @classmethod
    def one_per_row(cls, values_N: torch.Tensor) -> "JaggedIds":
        return cls(values_N, torch.arange(len(values_N) + 1))

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    def take(self, rows_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids of some rows, one row after the other, and how many each row has."""
        starts_B = self.offsets_N1[rows_B]
        lengths_B = self.offsets_N1[rows_B + 1] - starts_B
        ends_B = lengths_B.cumsum(0)
        shifts_T = torch.repeat_interleave(starts_B - (ends_B - lengths_B), lengths_B)
        return self.values_T[torch.arange(len(shifts_T)) + shifts_T], lengths_B

    def of_rows(self, rows_B: torch.Tensor) -> "JaggedIds":
        """The same feature on some rows only."""
        values_T, lengths_B = self.take(rows_B)
        return JaggedIds(values_T, torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]))


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one split in memory."""

    dense_NF: torch.Tensor
    sparse: Mapping[str, JaggedIds]
    labels_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels_N)
