"""The re-clustering of a model: read at one step, computed beside it, committed then or at a later step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.lowering import DecodedTable, Table
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives, ProcessGroupCollectives
from cce_torchrec.recluster.config import ReclusterConfig, TableReport
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables
from cce_torchrec.recluster.stores import Store
from cce_torchrec.recluster.table_work import CodebooksWork, TableWork, WindowsWork
from cce_torchrec.sums_by_id import SumsById


class CollectionWork:
    """The re-clustering of one collection's tables; collective, as all of its steps.

    Args:
        collection: sharded or not.
        process_group: of ranks that share the work, where the collection is not sharded.
        optimizer: as for :func:`cce_torchrec.recluster`.
        id_weights: by table.
        config: whether optimizer state is carried, and so read.
    """

    def __init__(
        self,
        collection: Collection,
        process_group: Any,
        optimizer: Optimizer | None,
        id_weights: Mapping[str, Tensor],
        config: ReclusterConfig,
    ) -> None:
        if isinstance(collection, ShardedCompressedEmbeddingBagCollection):
            process_group = collection.process_group
        if process_group is not None and dist.get_world_size(process_group) == 1:
            process_group = None
        self.collection, self.process_group = collection, process_group
        self._optimizer, self._config = optimizer, config
        self._collectives = collectives_of(process_group)
        with self._collectives.one_fails_all_fail():
            self._store = Store(collection, optimizer, self._collectives)
            self.gradients = _recorded(collection, self._collectives)
            self.tables = [
                self._work(table, id_weights.get(table.name), self.gradients.get(table.name))
                for table in reclusterable_tables(collection)
            ]

    def _work(self, table: Table, weights_V: Tensor | None, gradients: SumsById | None) -> TableWork[Any, Any]:
        if isinstance(table, DecodedTable):
            return WindowsWork(table, self._optimizer, weights_V, gradients, self._config)
        counts = self.collection.id_counts.by_table.get(table.name)
        counted = None if counts is None else counts.sums().snapshot()
        return CodebooksWork(table, self._store, weights_V, gradients, counted, self._config)

    def read(self) -> None:
        """Keep what the tables are made of now."""
        with self._collectives.one_fails_all_fail():
            for table in self.tables:
                table.read()

    def compute(self, seed: int, collectives: Collectives | None = None) -> None:
        """Cluster all tables, over other collectives than those of the process group where they are given."""
        collectives = collectives or self._collectives
        with collectives.one_fails_all_fail():
            for table in self.tables:
                table.compute(seed, self._config, collectives)

    def catch_up(self) -> None:
        """Move what was computed as far as the tables were trained since :meth:`read`."""
        with self._collectives.one_fails_all_fail():
            self._store = Store(self.collection, self._optimizer, self._collectives)
            for table in self.tables:
                table.catch_up(self._store, self._config, self._collectives)

    def commit(self) -> list[TableReport]:
        """Put everything in place; nothing here can fail or waits for another rank."""
        codebooks = [table.commit(self._store) for table in self.tables]
        self._store.write({name: weight for of_table in codebooks for name, weight in of_table.items()})
        if isinstance(self.collection, ShardedCompressedEmbeddingBagCollection):
            self.collection.assignments_changed()
        return [table.report() for table in self.tables if table.new is not None]


class Reclustering:
    """The re-clustering of a model; collective, as all of its steps.

    Args:
        collections: of the model.
        seed: as for :func:`cce_torchrec.recluster`, as are the others.
        config: sizes, and what becomes of optimizer state.
        process_group: of ranks that share the work on unsharded collections.
        optimizer: what trains the tables that no fused kernel trains.
        id_weights: by table.
    """

    def __init__(
        self,
        collections: Sequence[Collection],
        *,
        seed: int,
        config: ReclusterConfig | None,
        process_group: Any,
        optimizer: Optimizer | None,
        id_weights: Mapping[str, Tensor] | None,
    ) -> None:
        config, self._seed = config or ReclusterConfig(), seed
        self.parts = [
            CollectionWork(collection, process_group, optimizer, id_weights or {}, config) for collection in collections
        ]

    @torch.no_grad()
    def read(self) -> None:
        """Keep what the tables are made of now, so that they may be trained on before they are put in place."""
        for part in self.parts:
            part.read()

    @torch.no_grad()
    def compute(self, collectives: Sequence[Collectives] | None = None) -> None:
        """Cluster all tables, one after another, beside the model.

        Args:
            collectives: of each collection; those of its process group where ``None``.
        """
        for index, part in enumerate(self.parts):
            part.compute(self._seed, collectives[index] if collectives else None)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Move what was computed as far as the tables were trained since :meth:`read`."""
        for part in self.parts:
            part.catch_up()

    @torch.no_grad()
    def commit(self) -> tuple[TableReport, ...]:
        """Put everything in place."""
        return tuple(report for part in self.parts for report in part.commit())


def collectives_of(process_group: Any) -> Collectives:
    """How to reach the other ranks; ``None`` where there are none."""
    return LocalCollectives() if process_group is None else ProcessGroupCollectives(process_group)


def _recorded(collection: Collection, collectives: Collectives) -> dict[str, SumsById]:
    """What this rank has recorded by table; all ranks have recorded, or none has."""
    gradients = collection.id_gradients
    recording = int(collectives.all_reduce_sum(torch.tensor([int(gradients is not None)])))
    if recording not in (0, collectives.world_size):
        raise RuntimeError(
            f"{recording} of {collectives.world_size} ranks have recorded gradients: call record_gradients on all ranks."
        )
    return gradients.by_table if gradients is not None else {}
