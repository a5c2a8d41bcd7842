"""Planning and counting for any number of devices; nothing whose size is that of a vocabulary is allocated."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.id_sharding import block_of_ids
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods import FullTable, RowMethod
from cce_torchrec.methods.base import check_positive
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.planner import BudgetPlan, PlannedTable, plan_compression
from cce_torchrec.planner.candidates import full_placement
from cce_torchrec.planner.expected_loss import expected_loss
from cce_torchrec.planner.footprint import Devices, footprint
from cce_torchrec.planner.perf import Sent, sent
from cce_torchrec.planner.plan import SHARDING_TYPE
from cce_torchrec.planner.traffic import Traffic, traffic_of
from cce_torchrec.replace import with_method
from cce_torchrec.simulate.config import SimulationConfig
from cce_torchrec.simulate.machine import Machine, communication
from cce_torchrec.simulate.work import ReclusterWork, recluster_work


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a model takes on a number of devices.

    Attributes:
        plan: method, size and place of every table.
        rank_bytes: what each rank holds, a re-clustering included: (most, mean).
        sent: bytes a step and rank.
        distances: that a rank computes in a re-clustering, at most: bounds save some.
        recluster_sent: bytes a rank sends in a re-clustering.
        recluster_seconds: of its parts, by a machine's rates; ``None`` without a machine.
        planning_seconds: that choosing the plan took.
    """

    plan: BudgetPlan
    rank_bytes: tuple[int, float]
    sent: Sent
    distances: int
    recluster_sent: float
    recluster_seconds: Mapping[str, float] | None
    planning_seconds: float

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        methods = Counter(
            f"{table.method.key} {table.placement}" if table.method.key == "full" else _sizes_of(table)
            for table in self.plan.tables
        )
        return {
            "world_size": self.plan.world_size,
            "tables": dict(methods),
            "expected_loss": self.plan.loss,
            "rank_bytes": {"max": self.rank_bytes[0], "mean": self.rank_bytes[1]},
            "sent_a_step_and_rank": self.sent._asdict(),
            "recluster": {
                "distances_a_rank": self.distances,
                "sent_a_rank": self.recluster_sent,
                "seconds": None if self.recluster_seconds is None else dict(self.recluster_seconds),
            },
            "planning_seconds": self.planning_seconds,
        }


def _sizes_of(table: PlannedTable) -> str:
    sizes = ", ".join(f"{name}={getattr(table.method, name, None)}" for name in ("num_rows", "num_columns"))
    return f"{table.method.key} {sizes}"


def simulate(config: SimulationConfig, world_size: int, machine: Machine | None = None) -> Simulation:
    """Plan a model for ``world_size`` devices and count what it takes on each.

    Where tables go is what :func:`cce_torchrec.plan_compression` says: compressed ones are replicated, their assignments
    split by id where their config says so, full ones are split by rows or replicated. It leaves TorchRec's planner nothing
    to choose, which is not run: it makes a shard of every table on every rank.

    Args:
        config: the model.
        world_size: how many devices.
        machine: rates of one rank, for the time of a re-clustering.

    Raises:
        ValueError: as :func:`cce_torchrec.plan_compression`, such as for a budget that cannot be met.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> item = EmbeddingBagConfig(name="t_item", num_embeddings=10_000_000, embedding_dim=32, feature_names=["item"])
        >>> model = SimulationConfig(
        ...     tables=(item,), pooling_factors={"t_item": 1.0}, budget_bytes=120_000_000, batch_size=2048
        ... )
        >>> simulate(model, 8).sent.vectors  # nothing but gradients: codebooks are replicated
        0.0
    """
    check_positive(world_size=world_size)
    started = time.perf_counter()
    plan = _plan(config, world_size)
    planning_seconds = time.perf_counter() - started
    lowered = _lowered(config, plan)
    steps = [
        _sent(table, planned, config.pooling_factors[planned.table], config.batch_size, world_size)
        for table, planned in zip(lowered, plan.tables, strict=True)
    ]
    work = [
        recluster_work(
            table.row_map, config.recluster, world_size, config.device_type, has_sharded_assignments(table.config)
        )
        for table in lowered
        if isinstance(table.row_map, CCERowMap)
    ]
    held_W = sum(
        (_held(table, planned, world_size) for table, planned in zip(lowered, plan.tables, strict=True)),
        np.full(world_size, plan.transient_bytes, dtype=np.int64),
    )
    assert int(held_W.max()) == plan.total_bytes
    return Simulation(
        plan=plan,
        rank_bytes=(int(held_W.max()), float(held_W.mean())),
        sent=Sent(*(sum(parts) / world_size for parts in zip(*steps, strict=True))),
        distances=sum(
            w.num_fits * (w.fit.search_distances + w.fit.seeding_distances) + w.assign_distances for w in work
        ),
        recluster_sent=sum(message.sent(world_size) for w in work for message in w.messages),
        recluster_seconds=None if machine is None else _seconds(work, machine, config),
        planning_seconds=planning_seconds,
    )


def _plan(config: SimulationConfig, world_size: int) -> BudgetPlan:
    """Tables whose methods are given take their bytes; the others are planned within what they leave."""
    devices = Devices(
        world_size=world_size,
        optimizer=config.optimizer,
        recluster=config.recluster,
        device_type=config.device_type,
    )
    traffic = traffic_of(config.tables, config.pooling_factors)
    lookups = sum(each.lookups for each in traffic.values())
    planned = {
        table.name: _given(table, config.fixed[table.name], traffic[table.name], lookups, devices)
        for table in config.tables
        if table.name in config.fixed
    }
    left = config.budget_bytes - sum(table.bytes.held for table in planned.values())
    others = [table for table in config.tables if table.name not in config.fixed]
    gap = 0.0
    if others:
        if left <= 0:
            raise ValueError(
                f"budget_bytes={config.budget_bytes:,} is {-left:,} bytes too small for the tables whose methods are given, "
                f"on {world_size} devices: raise it, or leave methods out."
            )
        plan = plan_compression(
            others,
            budget_bytes=left,
            statistics={table.name: config.pooling_factors[table.name] for table in others},
            methods=config.methods,
            world_size=world_size,
            optimizer=config.optimizer,
            recluster=config.recluster,
            device_type=config.device_type,
        )
        planned |= {
            table.table: replace(table, traffic=traffic[table.table].lookups / lookups) for table in plan.tables
        }
        gap = plan.gap
    return BudgetPlan(
        tables=tuple(planned[table.name] for table in config.tables),
        budget_bytes=config.budget_bytes,
        world_size=world_size,
        gap=gap,
    )


def _given(
    table: EmbeddingBagConfig, method: RowMethod, traffic: Traffic, lookups: float, devices: Devices
) -> PlannedTable:
    """A table whose method is given, replicated if that compresses it."""
    placement = full_placement(table, devices) if isinstance(method, FullTable) else "replicated"
    return PlannedTable(
        table=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        method=method,
        placement=placement,
        bytes=footprint(table, method, placement, devices),
        traffic=traffic.lookups / lookups,
        loss=expected_loss(method, table, traffic),
    )


def _lowered(config: SimulationConfig, plan: BudgetPlan) -> list[LoweredTable]:
    """The tables as they would be built, on "meta"."""
    tables = [with_method(table, plan.methods[table.name]) for table in config.tables]
    return CompressedEmbeddingBagCollection(tables=tables, device=torch.device("meta")).lowered_tables


def _sent(table: LoweredTable, planned: PlannedTable, factor: float, batch_size: int, world_size: int) -> Sent:
    """Bytes that all ranks send in a step for one table."""
    parts = []
    for column in table.row_map.columns:
        lookups = batch_size * factor * table.row_map.rows_per_id
        # Shards are alike in what is sent for them, whatever rows they have: a replica or a block of rows on each rank.
        shards = 1 if planned.placement == "table_wise" else world_size
        of_shard = sent(
            SHARDING_TYPE[planned.placement], (column.num_rows, column.dim), table, world_size, batch_size, lookups
        )
        parts.append([shards * part for part in of_shard])
    return Sent(*(sum(of_kind) for of_kind in zip(*parts, strict=True)))


def _held(table: LoweredTable, planned: PlannedTable, world_size: int) -> np.ndarray:
    """The bytes of a table on each rank: the first has the most, the last may have fewer ids."""
    num_ids = planned.num_embeddings
    blocks_W = np.array([np.diff(block_of_ids(num_ids, rank, world_size))[0] for rank in range(world_size)])
    per_id = 0
    if planned.placement == "row_wise":
        per_id = planned.bytes.held // int(blocks_W[0])
    elif isinstance(table.row_map, CCERowMap) and has_sharded_assignments(table.config):
        per_id = 2 * table.row_map.assignments.shape[1] * table.row_map.assignments.element_size()  # old and new ones
    return planned.bytes.held - (blocks_W[0] - blocks_W) * per_id


def _seconds(work: list[ReclusterWork], machine: Machine, config: SimulationConfig) -> dict[str, float]:
    """Of one re-clustering of all tables, one after another."""
    total = {"fit": 0.0, "assign": 0.0, "communication": 0.0}
    for of_table in work:
        for part, seconds in machine.seconds(of_table).items():
            total[part] += seconds
    if config.network is not None:
        total["communication"] = sum(communication(config.network, w.messages, w.world_size) for w in work)
    return total
