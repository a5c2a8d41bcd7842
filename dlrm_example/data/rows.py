"""Some rows of prepared data in memory, features in the order of a batch's keys.

Shape suffixes: P rows, F dense or one-hot features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dlrm_example.data.dataset import JaggedIds
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import Manifest, SparseColumn


@dataclass(frozen=True)
class Rows:
    """Some rows in memory, features in the order of the keys."""

    dense_PF: torch.Tensor
    labels_P: torch.Tensor
    one_hot_FP: torch.Tensor
    multi_hot: tuple[JaggedIds, ...]

    def __len__(self) -> int:
        return len(self.labels_P)

    def part(self, start: int, end: int) -> "Rows":
        return Rows(
            self.dense_PF[start:end],
            self.labels_P[start:end],
            self.one_hot_FP[:, start:end],
            tuple(_part(ids, start, end) for ids in self.multi_hot),
        )

    @staticmethod
    def joined(pieces: "Sequence[Rows]", manifest: Manifest) -> "Rows":
        """Any number of pieces, one after the other."""
        if not pieces:
            return Rows.of_table(_no_rows(manifest), manifest, torch.zeros(0, dtype=torch.int64))
        if len(pieces) == 1:
            return pieces[0]
        return Rows(
            torch.cat([piece.dense_PF for piece in pieces]),
            torch.cat([piece.labels_P for piece in pieces]),
            torch.cat([piece.one_hot_FP for piece in pieces], dim=1),
            tuple(_joined(ids) for ids in zip(*(piece.multi_hot for piece in pieces), strict=True)),
        )

    @staticmethod
    def of_table(table: pa.Table, manifest: Manifest, rows_P: torch.Tensor) -> "Rows":
        """Those rows of a prepared table.

        Raises:
            DataUnavailableError: the table has an id outside of its embedding table.
        """
        dense_PF = torch.empty(len(rows_P), len(manifest.dense))
        for number, name in enumerate(manifest.dense):
            dense_PF[:, number] = torch.from_numpy(_numpy(table[name]))[rows_P]
        one_hot = [column for column in manifest.sparse if not column.multi_hot]
        one_hot_FP = torch.empty(len(one_hot), len(rows_P), dtype=torch.int32)
        for number, column in enumerate(one_hot):
            torch.index_select(_checked(table[column.name], column), 0, rows_P, out=one_hot_FP[number])
        jagged = [_jagged(table[column.name], column) for column in manifest.sparse if column.multi_hot]
        labels_P = torch.from_numpy(_numpy(table[manifest.label]))[rows_P].long()
        return Rows(dense_PF, labels_P, one_hot_FP, tuple(ids.of_rows(rows_P) for ids in jagged))


def _part(ids: JaggedIds, start: int, end: int) -> JaggedIds:
    offsets = ids.offsets_N1[start : end + 1]
    return JaggedIds(ids.values_T[offsets[0] : offsets[-1]], offsets - offsets[0])


def _joined(pieces: tuple[JaggedIds, ...]) -> JaggedIds:
    lengths = torch.cat([ids.offsets_N1.diff() for ids in pieces])
    return JaggedIds(torch.cat([ids.values_T for ids in pieces]), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))


def _no_rows(manifest: Manifest) -> pa.Table:
    columns = {manifest.label: pa.int8(), **dict.fromkeys(manifest.dense, pa.float32())}
    columns |= {each.name: pa.list_(pa.int32()) if each.multi_hot else pa.int32() for each in manifest.sparse}
    return pa.schema(columns.items()).empty_table()


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A copy, since torch does not take memory that must not be written."""
    return np.concatenate([part.to_numpy() for part in column.chunks] or [column.to_numpy()])


def _checked(ids: pa.ChunkedArray, column: SparseColumn) -> torch.Tensor:
    """The ids, which FBGEMM does not check on every device.

    Raises:
        DataUnavailableError: one is outside its table.
    """
    numbers = _numpy(ids)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < column.num_embeddings):
        span = f"ids {numbers.min()} to {numbers.max()}"
        raise DataUnavailableError(
            f"{column.name}: {span} leave the table of {column.num_embeddings}: prepare the data again"
        )
    return torch.from_numpy(numbers)


def _jagged(lists: pa.ChunkedArray, column: SparseColumn) -> JaggedIds:
    lengths = _numpy(pc.list_value_length(lists))
    flat = pc.list_flatten(lists)
    offsets = torch.nn.functional.pad(torch.from_numpy(lengths).long().cumsum(0), (1, 0))
    return JaggedIds(_checked(flat, column), offsets)
