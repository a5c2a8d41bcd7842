"""Re-clustering a model: read everything, compute new state beside the old, commit once on all ranks."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.lowering import DecodedTable, LoweredTable, Table
from cce_torchrec.methods import METHODS
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives, ProcessGroupCollectives
from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport, TableReport
from cce_torchrec.recluster.counts import choose_ids
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables
from cce_torchrec.recluster.stores import Store
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import NewTable, TableState
from cce_torchrec.recluster.vocabulary import check_weights
from cce_torchrec.recluster.windows import NewWindows, WindowsState, recluster_windows
from cce_torchrec.sums_by_id import SumsById

logger = logging.getLogger(__name__)


@torch.no_grad()
def recluster(
    module: nn.Module,
    *,
    seed: int,
    config: ReclusterConfig | None = None,
    process_group: Any = None,
    optimizer: Optimizer | None = None,
    id_weights: Mapping[str, Tensor] | None = None,
) -> ReclusterReport:
    """Re-cluster every table with learned assignments (CCE, residual CCE, CCE on circular memory) in a model, sharded or not.

        M_i <- K-means centroids,  h_i <- nearest centroid,  h'_i <- fresh hash,  M'_i <- mean residuals

    Collective: where the model is sharded or ``process_group`` is given, every rank calls it at the same step. The result
    does not depend on the number of ranks, up to float rounding. Old state stands until every table of every rank is
    done; an error on one rank is raised on all, and then nothing has changed.

    Args:
        module: anything that contains compressed collections: a collection, a model, a ``DistributedModelParallel``.
        seed: of the sample, the K-means and the new helper hashes; the same on every rank.
        config: sizes, and what becomes of optimizer state; the defaults where ``None``.
        process_group: ranks that share the work on unsharded collections, which must be replicas of each other; a sharded
            collection always uses its own.
        optimizer: what trains the tables that no fused kernel trains (data-parallel ones, unsharded ones), so that its
            state of rewritten rows is reset or carried too.
        id_weights: how much each id matters, [num_embeddings] by logical table, such as its frequency; 1 where missing. Where
            only some ids have stored assignments, also which (else those seen most often in training).

    Returns:
        How each table changed; those of which no id is to have stored assignments yet do not.

    Raises:
        ValueError: where there is nothing to re-cluster, weights are NaN, ``id_weights`` do not fit, or the ids seen most
            often are to be chosen and none was seen.
        RuntimeError: where another rank failed.

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> recluster(CompressedEmbeddingBagCollection(tables=[table]), seed=0).tables[0].version
        1

    Paper: Tsang & Ahle, "Clustering the Sketch", NeurIPS 2023, arXiv 2210.05974, algorithm 3.
    """
    config = config or ReclusterConfig()
    collections = [found for found in module.modules() if isinstance(found, Collection)]
    _check(module, collections, id_weights or {})
    reports = []
    commits = []
    new_windows: list[tuple[DecodedTable, NewWindows]] = []
    for collection in collections:
        collectives = _collectives(collection, process_group)
        with collectives.one_fails_all_fail():
            store = Store(collection, optimizer, collectives)
            recorded = _recorded(collection, collectives)
            new_tables: list[tuple[LoweredTable, NewTable]] = []
            for table in reclusterable_tables(collection):
                started = time.perf_counter()
                weights_V = (id_weights or {}).get(table.name)
                new: NewTable | NewWindows
                if isinstance(table, DecodedTable):
                    windows = WindowsState.read(
                        table.name, _decoder(table), optimizer, weights_V, recorded.get(table.name), config
                    )
                    new = recluster_windows(windows, seed=seed, config=config, collectives=collectives)
                    new_windows.append((table, new))
                else:
                    chosen = choose_ids(table, weights_V, collection.id_counts, collectives)
                    if chosen is not None and len(chosen) == 0:
                        continue
                    state = _read(table, store, weights_V, chosen, recorded.get(table.name), config)
                    new = recluster_table(state, seed=seed, config=config, collectives=collectives)
                    new_tables.append((table, new))
                reports.append(_report(table, new, time.perf_counter() - started))
        commits.append((collection, store, new_tables))
    for collection, store, new_tables in commits:
        _commit(collection, store, new_tables)
    for decoded, new_one in new_windows:
        _commit_windows(decoded, new_one, optimizer)
    for collection in collections:
        if collection.id_gradients is not None:
            collection.id_gradients.clear()
    return ReclusterReport(tables=tuple(reports))


def _decoder(table: DecodedTable) -> CCERobeDecoder:
    assert isinstance(table.decoder, CCERobeDecoder)
    return table.decoder


def _check_sharders(module: nn.Module) -> None:
    """Raise a ``ValueError`` where TorchRec's sharders have sharded what is inside a compressed collection."""
    for collection in module.modules():
        if isinstance(collection, CompressedEmbeddingBagCollection) and not isinstance(
            collection._embedding_bag_collection, EmbeddingBagCollection
        ):
            raise ValueError(
                "A compressed collection was sharded by TorchRec's sharders alone, which only see what is inside it: "
                "pass sharders=cce_torchrec.get_sharders() to DistributedModelParallel and to the planner."
            )


def _check(module: nn.Module, collections: list[Collection], id_weights: Mapping[str, Tensor]) -> None:
    _check_sharders(module)
    tables = {table.name: table for collection in collections for table in reclusterable_tables(collection)}
    if not tables:
        methods = [key for key, method in METHODS.items() if method.reclusterable]
        raise ValueError(
            f"{type(module).__name__} has no table to re-cluster ({len(collections)} compressed collections): only the "
            f"methods {methods} have assignments to learn; give a table one of them."
        )
    for name, weights_V in id_weights.items():
        if name not in tables:
            raise ValueError(f"id_weights has {name!r}, which is not a table to re-cluster; those are {list(tables)}.")
        check_weights(name, weights_V, tables[name].config.num_embeddings)


def _collectives(collection: Collection, process_group: Any) -> Collectives:
    if isinstance(collection, ShardedCompressedEmbeddingBagCollection):
        process_group = collection.process_group
    if process_group is None or dist.get_world_size(process_group) == 1:
        return LocalCollectives()
    return ProcessGroupCollectives(process_group)


def _recorded(collection: Collection, collectives: Collectives) -> dict[str, SumsById]:
    """What this rank has recorded by table; all ranks have recorded, or none has."""
    gradients = collection.id_gradients
    recording = int(collectives.all_reduce_sum(torch.tensor([int(gradients is not None)])))
    if recording not in (0, collectives.world_size):
        raise RuntimeError(
            f"{recording} of {collectives.world_size} ranks have recorded gradients: call record_gradients on all ranks."
        )
    return gradients.by_table if gradients is not None else {}


def _read(
    table: LoweredTable,
    store: Store,
    weights_V: Tensor | None,
    chosen_ids: Tensor | None,
    gradients: SumsById | None,
    config: ReclusterConfig,
) -> TableState:
    assert isinstance(table.row_map, CCERowMap)
    codebooks = [store.read(name) for name in table.physical_names]
    if config.optimizer_state == "carry":
        states = [
            store.read_optimizer(name, len(codebook))
            for name, codebook in zip(table.physical_names, codebooks, strict=True)
        ]
    else:
        states = [codebook.new_zeros(len(codebook), 0) for codebook in codebooks]
    return TableState(
        name=table.name,
        row_map=table.row_map,
        rows=table.row_map.rows,
        codebooks=codebooks,
        optimizer_state=states,
        weights_V=weights_V,
        chosen_ids=chosen_ids,
        gradients=gradients,
    )


def _report(table: Table, new: NewTable | NewWindows, seconds: float) -> TableReport:
    stored = _decoder(table) if isinstance(table, DecodedTable) else table.row_map
    assert isinstance(stored, CCERobeDecoder | CCERowMap)
    return TableReport(
        table=table.name,
        version=int(stored.version) + 1,
        relative_squared_error=new.relative_squared_error,
        moved_fraction=new.moved_fraction,
        empty_clusters=new.empty_clusters,
        seconds=seconds,
    )


def _commit(collection: Collection, store: Store, new_tables: list[tuple[LoweredTable, NewTable]]) -> None:
    """Put the new state in place; nothing here can fail or waits for another rank."""
    for table, new in new_tables:
        assert isinstance(table.row_map, CCERowMap)
        for name, state_RS, codebook in zip(table.physical_names, new.optimizer_state, new.codebooks, strict=True):
            store.write_optimizer(name, state_RS, len(codebook))
            if store.trained_elsewhere(name):
                _warn_of_stale_state(table, name)
        table.row_map.replace(new.assignments, new.ids, new.helper_coefficients)
    names_and_books = [
        (n, b) for table, new in new_tables for n, b in zip(table.physical_names, new.codebooks, strict=True)
    ]
    store.write(dict(names_and_books))
    if isinstance(collection, ShardedCompressedEmbeddingBagCollection):
        collection.assignments_changed()


def _commit_windows(table: DecodedTable, new: NewWindows, optimizer: Optimizer | None) -> None:
    """As :func:`_commit`, for a decode table."""
    if new.commit(_decoder(table), optimizer):
        _warn_of_stale_state(table, "memory")


def _warn_of_stale_state(table: Table, part: str) -> None:
    logger.warning(
        "Table %r was re-clustered, but no optimizer of its codebook %r is known, so its state is stale: pass "
        "the one that trains it as `optimizer=`.",
        table.name,
        part,
    )
