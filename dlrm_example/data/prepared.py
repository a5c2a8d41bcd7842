"""A folder that `dlrm_example.data.prepare` made, as a data set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dlrm_example.data.advice import not_prepared
from dlrm_example.data.dataset import BatchLoader, ColumnChoice, DatasetInfo, SparseFeature
from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import MANIFEST, Manifest, SparseColumn, column_file, read_manifest
from dlrm_example.data.multi_hot import Lookups, lookups_of
from dlrm_example.data.streaming import StreamingLoader


@dataclass(frozen=True)
class PreparedDataset:
    """A folder that `dlrm_example.data.prepare` made; one-hot columns come first in a batch."""

    folder: Path
    manifest: Manifest
    lookups: Mapping[str, Lookups] = field(default_factory=dict)  # of columns whose ids do not look up just themselves

    @property
    def info(self) -> DatasetInfo:
        features = tuple(self._feature(column) for column in self.manifest.sparse)
        return DatasetInfo(
            name="parquet", sparse_features=features, dense_names=self.manifest.dense, count_lookups=self._count_lookups
        )

    def _count_lookups(self) -> dict[str, np.ndarray]:
        """As counted by the preparation."""
        counts = {}
        for column in self.manifest.sparse:
            counts_V = np.load(column_file(self.folder, "counts", column.name))
            lookups = self.lookups.get(column.name)
            counts[column.name] = counts_V if lookups is None else lookups.counts(counts_V)
        return counts

    def _feature(self, column: SparseColumn) -> SparseFeature:
        lookups = self.lookups.get(column.name)
        if lookups is None:
            return SparseFeature(name=column.name, num_embeddings=column.num_embeddings, multi_hot=column.multi_hot)
        multi_hot = column.multi_hot or lookups.size > 1
        return SparseFeature(name=column.name, num_embeddings=lookups.num_embeddings, multi_hot=multi_hot)

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
        return StreamingLoader(
            folder=self.folder,
            manifest=self.manifest,
            lookups=self.lookups,
            files=self.manifest.splits[split],
            batch_size=batch_size,
            limit_batches=limit_batches,
            shuffle_seed=shuffle_seed,
            rank=rank,
            world_size=world_size,
        )


def open_prepared(folder: Path, columns: ColumnChoice) -> PreparedDataset:
    """Prepared data, with all of its features or those that are chosen.

    Raises:
        DataUnavailableError: it is not prepared, not complete, lacks a column, or sizes do not fit its columns.
    """
    if not (folder / MANIFEST).exists():
        raise not_prepared(folder, columns)
    manifest = read_manifest(folder)
    if columns.label not in (None, manifest.label):
        raise DataUnavailableError(f"{folder} was prepared with the label {manifest.label}, not {columns.label}")
    sparse_names = tuple(column.name for column in manifest.sparse)
    dense = _chosen("dense", columns.dense, manifest.dense, folder)
    by_name = {column.name: column for column in manifest.sparse}
    sparse = [by_name[name] for name in _chosen("sparse", columns.sparse, sparse_names, folder)]
    one_hot_first = tuple(sorted(sparse, key=lambda column: column.multi_hot))
    return PreparedDataset(folder, replace(manifest, dense=dense, sparse=one_hot_first), lookups_of(sparse, columns))


def _chosen(kind: str, wanted: tuple[str, ...] | None, there: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    missing = [name for name in wanted or () if name not in there]
    if missing:
        raise DataUnavailableError(
            f"{folder} was prepared without the {kind} columns {', '.join(missing)}; it has {', '.join(there)}"
        )
    return there if wanted is None else wanted
