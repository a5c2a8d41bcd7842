"""What :func:`cce_torchrec.plan_compression` returns: a method and a place for every table, with the bytes it takes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.methods import METHODS, MethodConfig
from cce_torchrec.planner.footprint import Footprint, Placement

_FORMAT = 1  # of the JSON
SHARDING_TYPE = {
    "replicated": ShardingType.DATA_PARALLEL.value,
    "row_wise": ShardingType.ROW_WISE.value,
    "table_wise": ShardingType.TABLE_WISE.value,
}
_HEADER = (
    f"{'table':<24}{'method':<16}{'ids':>14}{'assigned ids':>14}{'params':>14}{'placement':>12}{'codebooks B':>15}"
    f"{'grad. B':>14}{'optim. B':>14}{'assignm. B':>15}{'reclust. B':>15}{'traffic':>9}{'loss':>8}"
)


@dataclass(frozen=True, kw_only=True)
class PlannedTable:
    """What one table is to be.

    Attributes:
        table: its name.
        num_embeddings: its ids.
        embedding_dim: its dims.
        method: how it is compressed; ``FullTable()`` where it is not.
        placement: "replicated", "row_wise" or "table_wise".
        bytes: what it takes on each device.
        traffic: its share of the lookups of all tables.
        loss: the share of the energy of its vectors that is expected to be lost.
    """

    table: str
    num_embeddings: int
    embedding_dim: int
    method: MethodConfig
    placement: Placement
    bytes: Footprint
    traffic: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """A method for every table that together fit a budget; prints as a table, and goes to ``compress()`` as it is.

    Attributes:
        tables: one entry a table, in the order they were given.
        budget_bytes: of each device.
        world_size: how many devices.
        gap: by how much ``loss`` may be above the least possible; 0 where it is proved to be the least.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from cce_torchrec import plan_compression
        >>> item = EmbeddingBagConfig(name="t_item", num_embeddings=10_000_000, embedding_dim=16, feature_names=["item"])
        >>> plan = plan_compression([item], budget_bytes=500_000_000)
        >>> plan.total_bytes <= 500_000_000 and plan.methods["t_item"].key
        'cce'
    """

    tables: tuple[PlannedTable, ...]
    budget_bytes: int
    world_size: int
    gap: float

    @cached_property
    def methods(self) -> Mapping[str, MethodConfig]:
        """The method of each table, full ones too."""
        return {table.table: table.method for table in self.tables}

    @cached_property
    def _by_name(self) -> Mapping[str, PlannedTable]:
        return {table.table: table for table in self.tables}

    def method_for(self, table: EmbeddingBagConfig) -> MethodConfig | None:
        """The method of a table; ``None`` where it is none of those that were planned.

        Raises:
            ValueError: where it has other sizes than were planned, so that its bytes would be others.
        """
        planned = self._by_name.get(table.name)
        if planned is None:
            return None
        sizes = ("num_embeddings", "embedding_dim")
        now, then = ({name: getattr(each, name) for name in sizes} for each in (table, planned))
        if now != then:
            raise ValueError(f"it has {now}, but was planned with {then}: plan again with plan_compression.")
        return planned.method

    @property
    def transient_bytes(self) -> int:
        """What the turn of one table in a re-clustering takes: the largest of all tables'."""
        return max((table.bytes.transient for table in self.tables), default=0)

    @property
    def total_bytes(self) -> int:
        """What all tables take on each device, at the worst moment of a re-clustering."""
        return sum(table.bytes.held for table in self.tables) + self.transient_bytes

    @property
    def loss(self) -> float:
        """The objective: the losses of the tables, weighted by their traffic."""
        return sum(table.traffic * table.loss for table in self.tables)

    def constraints(self) -> dict[str, ParameterConstraints]:
        """The placements by logical table, for :func:`cce_torchrec.parameter_constraints`: bytes were counted under them."""
        return {t.table: ParameterConstraints(sharding_types=[SHARDING_TYPE[t.placement]]) for t in self.tables}

    def __str__(self) -> str:
        rows = []
        for t in self.tables:
            params, b = t.method.num_params(t.num_embeddings, t.embedding_dim), t.bytes
            rows.append(
                f"{t.table:<24}{t.method.key:<16}{t.num_embeddings:>14,}{_assigned_ids(t):>14}{params:>14,}{t.placement:>12}"
                f"{b.codebooks:>15,}{b.gradients:>14,}{b.optimizer:>14,}{b.assignments:>15,}{b.workspace:>15,}{t.traffic:>9.1%}{t.loss:>8.4f}"
            )
        total = (
            f"{self.total_bytes:,} of {self.budget_bytes:,} bytes on each of {self.world_size} devices, of which "
            f"{self.transient_bytes:,} for the turn of one table in a re-clustering; expected loss {self.loss:.4f}"
        )
        return "\n".join([_HEADER, *rows, total + (f" (at most {self.gap:.2g} above the least)." if self.gap else ".")])

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a file that is there stays whole until the new one is."""
        tables = [
            {
                **{f.name: getattr(t, f.name) for f in fields(t)},
                "method": _method_to_json(t.method),
                "bytes": asdict(t.bytes),
            }
            for t in self.tables
        ]
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"format": _FORMAT, **own, "tables": tables}, indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: where it is something else.
        """
        try:
            saved = json.loads(Path(path).read_text())
            if saved.pop("format") != _FORMAT:
                raise KeyError("format")
            tables = tuple(
                PlannedTable(**{**t, "method": _method_from_json(t["method"]), "bytes": Footprint(**t["bytes"])})
                for t in saved["tables"]
            )
            return cls(**{**saved, "tables": tables})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a plan of format {_FORMAT} ({error!r}): save one by BudgetPlan.save."
            ) from None


def _assigned_ids(table: PlannedTable) -> str:
    """How many ids have stored assignments."""
    if not table.method.stores_assignments:
        return "-"
    return f"{getattr(table.method, 'num_assigned_ids', None) or table.num_embeddings:,}"


def _method_to_json(method: MethodConfig) -> dict[str, Any]:
    return {"key": method.key, **asdict(method)}


def _method_from_json(saved: dict[str, Any]) -> MethodConfig:
    return METHODS[saved["key"]](**{name: value for name, value in saved.items() if name != "key"})
