"""Raw rows to prepared ones: good rows only, dense columns as float32, ids contiguous.

Shape suffixes: N rows of a chunk, T total values of a multi-hot column.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_example.data.vocabulary import Encoder, plain
from dlrm_example.errors import UsageError

DENSE_TRANSFORMS = ("none", "log1p")


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def has_label(rows: pa.Table, label: str) -> np.ndarray:
    """Which rows have a label that is 0 or 1."""
    try:
        values = rows[label].cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UsageError(f"--label_column {label} is {rows[label].type}; it must be numbers or booleans") from None
    return pc.fill_null(pc.or_(pc.equal(values, 0.0), pc.equal(values, 1.0)), False).to_numpy()


def flat_values(rows: pa.Table, name: str, max_ind_range: int | None) -> tuple[pa.Array, np.ndarray | None]:
    """The values of a column of ids and, of a list column, how many each row has; nulls within lists are left out."""
    column = rows[name].combine_chunks()
    try:
        if not is_list(column.type):
            return plain(column, max_ind_range), None
        values, parents_T = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
        present_T = values.is_valid().to_numpy(zero_copy_only=False)
        lengths_N = np.bincount(parents_T[present_T], minlength=len(column))
        return plain(values.drop_null(), max_ind_range), lengths_N
    except (ValueError, pa.ArrowInvalid) as error:
        raise UsageError(f"--sparse_columns {name}: {error}") from None


def encode_rows(
    rows: pa.Table,
    label: str,
    dense: Sequence[str],
    encoders: Mapping[str, Encoder],
    transform: Literal["none", "log1p"],
    max_ind_range: int | None,
) -> pa.Table:
    """Good rows as they are stored."""
    columns = {label: pc.cast(rows[label], pa.float64()).cast(pa.int8())}
    columns |= {name: pa.array(_dense(rows, name, transform)) for name in dense}
    for name, encoder in encoders.items():
        values, lengths_N = flat_values(rows, name, max_ind_range)
        ids = pa.array(encoder.encode(values))
        if lengths_N is not None:
            ids = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32), ids)
        columns[name] = ids
    return pa.table(columns)


def _dense(rows: pa.Table, name: str, transform: str) -> np.ndarray:
    """What is not known, or not finite, is 0 after the transform."""
    try:
        values_N = rows[name].cast(pa.float64(), safe=False).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UsageError(f"--dense_columns {name} is {rows[name].type}; it must be numbers") from None
    if transform == "log1p":
        values_N = np.log1p(np.maximum(values_N, 0.0))
    return np.nan_to_num(values_N, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)
