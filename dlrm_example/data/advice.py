"""What to run where somebody trains on Parquet files that are not prepared: the command, from what the files hold."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from dlrm_example.data.dataset import ColumnChoice
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.encoding import is_list
from dlrm_example.data.manifest import MANIFEST
from dlrm_example.data.sources import find_files, parquet_parts
from dlrm_example.errors import UsageError

LABEL_NAMES = ("label", "y", "click", "clicked", "is_click", "target")


def not_prepared(data_path: Path, columns: ColumnChoice) -> DataUnavailableError:
    """Names the remedy."""
    if not data_path.exists():
        return DataUnavailableError(f"--data_path {data_path} does not exist")
    command = prepare_command(data_path, columns)
    found = f"{data_path} is no prepared data: it holds no {MANIFEST}"
    if command is None:
        return DataUnavailableError(f"{found}, nor Parquet to prepare; see python -m dlrm_example.data.prepare --help")
    return DataUnavailableError(f"{found}; make a folder that has one, and give it as --data_path, with\n  {command}")


def prepare_command(folder: Path, columns: ColumnChoice) -> str | None:
    """The call of `dlrm_example.data.prepare` for Parquet below a folder; None where there is none.

    Columns are those that are asked for; else the label is one of a usual name, dense are other numbers with a point, and
    sparse is the rest of what can be ids. What cannot be told is a word in capitals.
    """
    try:
        schema, _ = parquet_parts(find_files([str(folder)], (".parquet",)))
    except UsageError:
        return None
    label = columns.label or next((name for name in LABEL_NAMES if name in schema.names), "LABEL")
    rest = [field for field in schema if field.name != label]
    dense = columns.dense or tuple(field.name for field in rest if pa.types.is_floating(field.type))
    sparse = columns.sparse or tuple(field.name for field in rest if field.name not in dense and _are_ids(field.type))
    command = ["python", "-m", "dlrm_example.data.prepare", "--input", str(folder), "--out", f"{folder}_prepared"]
    command += ["--label_column", label, "--dense_columns", _joined(dense, "DENSE"), "--sparse_columns"]
    return shlex.join([*command, _joined(sparse, "SPARSE")])


def _joined(names: Sequence[str], unknown: str) -> str:
    return ",".join(names) or unknown


def _are_ids(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or is_list(kind):
        kind = kind.value_type
    checks = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    return any(check(kind) for check in checks)
