"""Data sets by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dlrm_example.data.dataset import BatchLoader, ColumnChoice, Dataset, DatasetInfo, SparseFeature
from dlrm_example.data.download import DataUnavailableError, cache_folder
from dlrm_example.data.movielens import load_movielens_100k
from dlrm_example.data.prepared import open_prepared

ALL_COLUMNS = ColumnChoice()


class DatasetLoader(Protocol):
    """Reads a data set; a missing archive is fetched into the cache folder first."""

    def __call__(
        self, data_path: str | None, *, discard_last: int = 0, columns: ColumnChoice = ALL_COLUMNS
    ) -> Dataset: ...


def _movielens_100k(data_path: str | None, *, discard_last: int = 0, columns: ColumnChoice = ALL_COLUMNS) -> Dataset:
    assert columns == ALL_COLUMNS, "checked by the config"
    return load_movielens_100k(cache_folder(data_path), discard_last=discard_last)


def _parquet(data_path: str | None, *, discard_last: int = 0, columns: ColumnChoice = ALL_COLUMNS) -> Dataset:
    assert data_path is not None, "checked by the config"
    assert not discard_last, "checked by the config"
    return open_prepared(Path(data_path).expanduser(), columns)


DATASETS: Mapping[str, DatasetLoader] = {
    "movielens_100k": _movielens_100k,
    "parquet": _parquet,
}

__all__ = ["DATASETS", "BatchLoader", "ColumnChoice", "DataUnavailableError", "Dataset", "DatasetInfo", "SparseFeature"]
