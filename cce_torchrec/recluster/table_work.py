"""The re-clustering of one table: read at one step, computed beside it, committed then or at a later step."""

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from cce_torchrec.lowering import DecodedTable, LoweredTable, Table
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.recluster.catch_up import moved_codebooks, moved_memories
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig, TableReport
from cce_torchrec.recluster.counts import choose_ids
from cce_torchrec.recluster.stores import Store
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import NewTable, TableState
from cce_torchrec.recluster.windows import NewWindows, WindowsState, recluster_windows, stores
from cce_torchrec.sums_by_id import SumsById

logger = logging.getLogger(__name__)

State = TypeVar("State", TableState, WindowsState)
New = TypeVar("New", NewTable, NewWindows)


class TableWork(ABC, Generic[State, New]):
    """The re-clustering of one table.

    Args:
        table: it.
    """

    def __init__(self, table: Table) -> None:
        self.table, self.seconds = table, 0.0
        self.new: New | None = None
        self._state: State | None = None

    def read(self) -> None:
        """Keep what the table is made of now; else that is read when its turn to be computed comes. Collective."""
        self._state = self._read()

    @abstractmethod
    def _read(self) -> State:
        """What the table is made of now."""

    @abstractmethod
    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        """Set ``new``, which stays ``None`` where nothing is to change. Collective."""

    @abstractmethod
    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        """Move ``new`` as far as the table was trained since :meth:`read`. Collective."""

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


class CodebooksWork(TableWork[TableState, NewTable]):
    """A table whose ids have rows of codebooks.

    Args:
        table: it.
        store: where its codebooks are.
        weights_V: of its ids.
        gradients: recorded of it on this rank.
        counts: of its ids on this rank, where it has any.
        config: whether optimizer state is carried, and so read.
    """

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
        self._row_map, self._names, self._store = table.row_map, table.physical_names, store
        self._weights_V, self._gradients, self._counts = weights_V, gradients, counts
        self._is_carried = config.optimizer_state == "carry"

    def _read(self) -> TableState:
        codebooks = [self._store.read(name) for name in self._names]
        if self._is_carried:
            pairs = zip(self._names, codebooks, strict=True)
            states = [self._store.read_optimizer(name, len(codebook)) for name, codebook in pairs]
        else:
            states = [codebook.new_zeros(len(codebook), 0) for codebook in codebooks]
        return TableState(
            name=self.table.name,
            row_map=self._row_map,
            rows=self._row_map.rows,
            codebooks=codebooks,
            optimizer_state=states,
            weights_V=self._weights_V,
            gradients=self._gradients,
        )

    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        started = time.perf_counter()
        chosen = choose_ids(self.table.name, self._row_map, self._weights_V, self._counts, collectives)
        if chosen is None or len(chosen):
            state = replace(self._state or self._read(), chosen_ids=chosen)
            self.new = recluster_table(state, seed=seed, config=config, collectives=collectives)
        self.seconds = time.perf_counter() - started

    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        if self.new is not None:
            assert self._state is not None
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


class WindowsWork(TableWork[WindowsState, NewWindows]):
    """A table whose ids have windows of a circular memory.

    Args:
        table: it.
        optimizer: the one that trains its memories, unless one was applied in backward.
        weights_V: of its ids.
        gradients: recorded of it on this rank.
        config: whether optimizer state is carried, and so read.
    """

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
        self._weights_V, self._gradients, self._config = weights_V, gradients, config

    def _read(self) -> WindowsState:
        return WindowsState.read(
            self.table.name, self._decoder, self._optimizer, self._weights_V, self._gradients, self._config
        )

    def compute(self, seed: int, config: ReclusterConfig, collectives: Collectives) -> None:
        started = time.perf_counter()
        state = self._state or self._read()
        self.new = recluster_windows(state, seed=seed, config=config, collectives=collectives)
        self.seconds = time.perf_counter() - started

    def catch_up(self, store: Store, config: ReclusterConfig, collectives: Collectives) -> None:
        assert self.new is not None
        assert self._state is not None
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
