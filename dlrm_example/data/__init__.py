"""Data sets by name."""

from collections.abc import Mapping
from typing import Protocol

from dlrm_example.data.dataset import BatchLoader, Dataset, DatasetInfo, SparseFeature
from dlrm_example.data.download import DataUnavailableError, cache_folder
from dlrm_example.data.movielens import load_movielens_100k


class DatasetLoader(Protocol):
    """Reads a data set; a missing archive is fetched into the cache folder first."""

    def __call__(self, data_path: str | None, *, discard_last: int = 0) -> Dataset: ...


def _movielens_100k(data_path: str | None, *, discard_last: int = 0) -> Dataset:
    return load_movielens_100k(cache_folder(data_path), discard_last=discard_last)


DATASETS: Mapping[str, DatasetLoader] = {
    "movielens_100k": _movielens_100k,
}

__all__ = ["DATASETS", "BatchLoader", "DataUnavailableError", "Dataset", "DatasetInfo", "SparseFeature"]
