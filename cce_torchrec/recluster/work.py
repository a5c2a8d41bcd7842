"""The re-clustering of a model's tables: read at one step, computed beside the model, committed then or at a later step."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.lowering import DecodedTable, LoweredTable, Table
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.recluster.catch_up import moved_codebooks, moved_memories
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives, ProcessGroupCollectives
from cce_torchrec.recluster.config import ReclusterConfig, TableReport
from cce_torchrec.recluster.counts import choose_ids
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables
from cce_torchrec.recluster.stores import Store
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import NewTable, TableState
from cce_torchrec.recluster.windows import NewWindows, WindowsState, recluster_windows, stores
from cce_torchrec.sums_by_id import SumsById

logger = logging.getLogger(__name__)


class TableWork(ABC):
    """The re-clustering of one table.

    Args:
        table: it.
    """

    def __init__(self, table: Table) -> None:
        self.table, self.seconds = table, 0.0
        self.new: NewTable | NewWindows | None = None

    @abstractmethod
    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        """Set ``new``, from what was read; it stays ``None`` where nothing is to change. Collective."""

    @abstractmethod
    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        """Move ``new`` as far as the table was trained since it was read. Collective."""

    @abstractmethod
    def commit(self, store: Store) -> dict[str, Tensor]:
        """Put ``new`` in place, but for the codebooks that are returned, by name; nothing here waits for another rank."""

    @property
    @abstractmethod
    def version(self) -> int:
        """How many times the table has been re-clustered."""

    def report(self) -> TableReport:
        """What became of the table, after :meth:`commit`."""
        assert self.new is not None
        return TableReport(
            table=self.table.name,
            version=self.version,
            relative_squared_error=self.new.relative_squared_error,
            moved_fraction=self.new.moved_fraction,
            empty_clusters=self.new.empty_clusters,
            seconds=self.seconds,
        )

    def _warn_of_stale_state(self, part: str) -> None:
        logger.warning(
            "Table %r was re-clustered, but no optimizer of its codebook %r is known, so its state is stale: pass "
            "the one that trains it as `optimizer=`.",
            self.table.name,
            part,
        )


class CodebooksWork(TableWork):
    """A table whose ids have rows of codebooks.

    Args:
        table: it.
        store: where its codebooks are; they are read, collectively.
        weights_V: of its ids.
        gradients: recorded of it on this rank.
        counts: of its ids on this rank, where it has any.
        config: whether optimizer state is carried, and so read.
    """

    new: NewTable | None

    def __init__(
        self,
        table: LoweredTable,
        store: Store,
        weights_V: Tensor | None,
        gradients: SumsById | None,
        counts: SumsById | None,
        config: ReclusterConfig,
    ) -> None:
        super().__init__(table)
        assert isinstance(table.row_map, CCERowMap)
        self._row_map, self._names, self._counts = table.row_map, table.physical_names, counts
        codebooks = [store.read(name) for name in self._names]
        if config.optimizer_state == "carry":
            pairs = zip(self._names, codebooks, strict=True)
            states = [store.read_optimizer(name, len(codebook)) for name, codebook in pairs]
        else:
            states = [codebook.new_zeros(len(codebook), 0) for codebook in codebooks]
        self._state = TableState(
            name=table.name,
            row_map=self._row_map,
            rows=self._row_map.rows,
            codebooks=codebooks,
            optimizer_state=states,
            weights_V=weights_V,
            gradients=gradients,
        )

    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        started = time.perf_counter()
        chosen = choose_ids(self._state.name, self._row_map, self._state.weights_V, self._counts, collectives)
        if chosen is None or len(chosen):
            state = replace(self._state, chosen_ids=chosen)
            self.new = recluster_table(state, seed=seed, config=config, collectives=collectives)
        self.seconds = time.perf_counter() - started

    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        if self.new is not None:
            trained = [store.read(name) for name in self._names]
            codebooks = moved_codebooks(self._state, self.new, trained, config, collectives)
            self.new = replace(self.new, codebooks=codebooks)

    def commit(self, store: Store) -> dict[str, Tensor]:
        if self.new is None:
            return {}
        for name, state_RS, codebook in zip(self._names, self.new.optimizer_state, self.new.codebooks, strict=True):
            store.write_optimizer(name, state_RS, len(codebook))
            if store.trained_elsewhere(name):
                self._warn_of_stale_state(name)
        self._row_map.replace(self.new.assignments, self.new.ids, self.new.helper_coefficients)
        return dict(zip(self._names, self.new.codebooks, strict=True))

    @property
    def version(self) -> int:
        return int(self._row_map.version)


class WindowsWork(TableWork):
    """A table whose ids have windows of a circular memory.

    Args:
        table: it.
        optimizer: the one that trains its memories, unless one was applied in backward.
        weights_V: of its ids.
        gradients: recorded of it on this rank.
        config: whether optimizer state is carried, and so read.
    """

    new: NewWindows | None

    def __init__(
        self,
        table: DecodedTable,
        optimizer: Optimizer | None,
        weights_V: Tensor | None,
        gradients: SumsById | None,
        config: ReclusterConfig,
    ) -> None:
        super().__init__(table)
        assert isinstance(table.decoder, CCERobeDecoder)
        self._decoder, self._optimizer = table.decoder, optimizer
        self._state = WindowsState.read(table.name, table.decoder, optimizer, weights_V, gradients, config)

    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        started = time.perf_counter()
        self.new = recluster_windows(self._state, seed=seed, config=config, collectives=collectives)
        self.seconds = time.perf_counter() - started

    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        assert self.new is not None
        main, helper = stores(self._decoder, self._optimizer)
        trained = main.read(), helper.read()
        self.new = replace(self.new, memories=moved_memories(self._state, self.new, trained, config, collectives))

    def commit(self, store: Store) -> dict[str, Tensor]:
        assert self.new is not None
        if self.new.commit(self._decoder, self._optimizer):
            self._warn_of_stale_state("memory")
        return {}

    @property
    def version(self) -> int:
        return int(self._decoder.version)


class CollectionWork:
    """The re-clustering of one collection's tables; made by reading all they are made of, collectively.

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
                self._read(table, id_weights.get(table.name), self.gradients.get(table.name))
                for table in reclusterable_tables(collection)
            ]

    def _read(self, table: Table, weights_V: Tensor | None, gradients: SumsById | None) -> TableWork:
        if isinstance(table, DecodedTable):
            return WindowsWork(table, self._optimizer, weights_V, gradients, self._config)
        counts = self.collection.id_counts.by_table.get(table.name)
        counted = None if counts is None else counts.sums().snapshot()
        return CodebooksWork(table, self._store, weights_V, gradients, counted, self._config)

    def compute(self, seed: int, collectives: Collectives | None = None) -> None:
        """Cluster all tables, over other collectives than those of the process group where they are given."""
        collectives = collectives or self._collectives
        with collectives.one_fails_all_fail():
            for table in self.tables:
                table.compute(seed, self._config, collectives)

    def catch_up(self) -> None:
        """Move what was computed as far as the tables were trained since they were read."""
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
    """The re-clustering of a model, in three steps; made by reading the model, all steps are collective.

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
    def compute(self, collectives: Sequence[Collectives] | None = None) -> None:
        """Cluster all tables, beside the model, which is only read.

        Args:
            collectives: of each collection; those of its process group where ``None``.
        """
        for index, part in enumerate(self.parts):
            part.compute(self._seed, collectives[index] if collectives else None)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Move what was computed as far as the tables were trained since they were read."""
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
