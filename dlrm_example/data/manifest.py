"""What a folder of prepared data says of itself, in `manifest.json`.

manifest.json                     columns, table sizes, files with rows, bytes and checksums, what made them
{train,val,test}/part_N.parquet   the label, dense columns as float32, ids as int32, multi-hot ids as list<int32>
vocabulary/COLUMN.parquet         the value behind each id, from id `FIRST_ID` on; none for hashed columns
counts/COLUMN.npy                 how often each id occurs in the training rows
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from dlrm_example.data.download import DataUnavailableError

MANIFEST = "manifest.json"
VERSION = 1
MISSING, UNKNOWN, FIRST_ID = 0, 1, 2  # ids of nulls, of values not in the vocabulary, and of the most frequent value


@dataclass(frozen=True, kw_only=True)
class SparseColumn:
    """A column of ids in `[0, num_embeddings)`; a multi-hot one has any number a row."""

    name: str
    num_embeddings: int
    multi_hot: bool


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One Parquet file; `path` is relative to the folder, `row_groups` are their rows."""

    path: str
    row_groups: tuple[int, ...]
    num_bytes: int
    sha256: str

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`; `made_by` holds settings, versions and counts for people."""

    label: str
    dense: tuple[str, ...]
    sparse: tuple[SparseColumn, ...]
    splits: dict[str, tuple[DataFile, ...]]
    made_by: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        splits = {
            name: tuple(DataFile(**{**file, "row_groups": tuple(file["row_groups"])}) for file in files)
            for name, files in content["splits"].items()
        }
        sparse = tuple(SparseColumn(**column) for column in content["sparse"])
        return cls(**{**content, "dense": tuple(content["dense"]), "sparse": sparse, "splits": splits})


def read_manifest(folder: Path) -> Manifest:
    """The manifest, once all files it lists are seen to be there with the size it says.

    Raises:
        DataUnavailableError: there is none, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DataUnavailableError(f"{folder} holds no {MANIFEST}, so dlrm_example.data.prepare did not make it")
    content = json.loads(path.read_text())
    if content.get("version") != VERSION:
        raise DataUnavailableError(
            f"{path} has version {content.get('version')}, not {VERSION}: prepare the data again"
        )
    manifest = Manifest.from_json(content)
    for file in (file for files in manifest.splits.values() for file in files):
        found = (folder / file.path).stat().st_size if (folder / file.path).exists() else None
        if found != file.num_bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataUnavailableError(
                f"{folder / file.path} {state}, expected {file.num_bytes}: prepare the data again"
            )
    return manifest


def column_file(folder: Path, kind: Literal["vocabulary", "counts"], column: str) -> Path:
    """Where a column's vocabulary or counts lie; signs that a file name cannot have are escaped."""
    return folder / kind / f"{quote(column, safe='')}{'.parquet' if kind == 'vocabulary' else '.npy'}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
