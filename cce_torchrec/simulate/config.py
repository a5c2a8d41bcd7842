"""The file that says what is simulated: YAML.

tables:                            # count: as many tables of this kind, t_0, t_1, ...
- {name: huge, count: 10, num_embeddings: 10000000000, embedding_dim: 64, assignment_placement: sharded}
- {name: mid, count: 1000, num_embeddings: 1000000, embedding_dim: 64, pooling_factor: 2, method: cce,
   options: {num_rows: 256, num_columns: 4}}                     # a table without a method gets one within the budget
budget_bytes: 40000000000          # of each device, for tables and re-clustering
batch_size: 2048                   # of each device
methods: [cce]                     # to choose from; this and what follows is optional
optimizer: rowwise_adagrad
device_type: cuda
recluster: {num_iterations: 25}
network: {latency: 0.00002, bytes_per_second: 50000000000}     # where the machine was measured on one rank
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CompressedEmbeddingBagConfig
from cce_torchrec.methods import FullTable, RowMethod
from cce_torchrec.methods.base import check_positive
from cce_torchrec.planner.budget import Methods
from cce_torchrec.planner.expected_loss import PLANNABLE
from cce_torchrec.planner.footprint import OptimizerName
from cce_torchrec.recluster import ReclusterConfig
from cce_torchrec.simulate.machine import Network
from cce_torchrec.swap.rules import CompressionRule

_NEEDED = ("name", "num_embeddings", "embedding_dim")
_NUMBERS = ("count", "num_embeddings", "embedding_dim")
_OPTIONAL = ("count", "pooling_factor", "assignment_placement", "method", "options")


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """A model and what it is trained with; tables have one feature each.

    Attributes:
        tables: logical tables.
        pooling_factors: ids a bag, by table.
        fixed: the methods that are given, by table; the others are chosen within the budget.
        budget_bytes: of each device, as for :func:`cce_torchrec.plan_compression`.
        batch_size: examples a device.
        methods: as for :func:`cce_torchrec.plan_compression`.
        optimizer: as for :func:`cce_torchrec.plan_compression`.
        recluster: how tables are re-clustered.
        device_type: "cuda" or "cpu".
        network: between the devices, instead of the measured one.
    """

    tables: tuple[EmbeddingBagConfig, ...]
    pooling_factors: Mapping[str, float]
    fixed: Mapping[str, RowMethod] = field(default_factory=dict)
    budget_bytes: int
    batch_size: int
    methods: Methods = ("cce",)
    optimizer: OptimizerName = "rowwise_adagrad"
    recluster: ReclusterConfig = field(default_factory=ReclusterConfig)
    device_type: str = "cuda"
    network: Network | None = None

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ValueError: where it is no such file: it names the key and what is wrong with it.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML: {error}") from None
        try:
            return cls._parse(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, data: Any) -> Self:
        known = tuple(f.name for f in fields(cls) if f.name not in ("pooling_factors", "fixed"))
        _check_keys(data, "the file", known, needed=("tables", "budget_bytes", "batch_size"))
        if not isinstance(data["tables"], list) or not data["tables"]:
            raise ValueError(f"tables is {data['tables']}, not a list with a table or more.")
        tables, factors, fixed = [], {}, {}
        for entry in data["tables"]:
            _check_keys(entry, f"table {entry}", _NEEDED + _OPTIONAL, needed=_NEEDED)
            check_positive(**{key: entry[key] for key in _NUMBERS if key in entry})
            method = _method(entry)
            for table in _tables(entry):
                tables.append(table)
                factors[table.name] = float(entry.get("pooling_factor", 1.0))
                if method is not None:
                    fixed[table.name] = method
        parts = {"recluster": ReclusterConfig, "network": Network}
        rest = {
            name: parts[name](**data[name]) if name in parts else data[name]
            for name in known
            if name in data and name != "tables"
        }
        return cls(tables=tuple(tables), pooling_factors=factors, fixed=fixed, **rest)


def _check_keys(data: Any, name: str, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{name} is no mapping with the keys {', '.join(known)}.")
    unknown, missing = [key for key in data if key not in known], [key for key in needed if key not in data]
    wrong = [f"{what} {keys}" for what, keys in (("has unknown keys", unknown), ("lacks", missing)) if keys]
    if wrong:
        raise ValueError(f"{name} {' and '.join(wrong)}; the keys are {', '.join(known)}.")


def _tables(entry: dict[str, Any]) -> list[EmbeddingBagConfig]:
    count, base = entry.get("count"), entry["name"]
    names = [base] if count is None else [f"{base}_{number}" for number in range(count)]
    placement = {key: entry[key] for key in ("assignment_placement",) if key in entry}
    return [
        CompressedEmbeddingBagConfig(
            name=name,
            num_embeddings=entry["num_embeddings"],
            embedding_dim=entry["embedding_dim"],
            feature_names=[name],
            **placement,
        )
        for name in names
    ]


def _method(entry: dict[str, Any]) -> RowMethod | None:
    """The method that a table is given, if any."""
    if "method" not in entry:
        return None
    rule = CompressionRule(method=entry["method"], options=entry.get("options", {}))
    try:
        method = rule.method_for(entry["num_embeddings"], entry["embedding_dim"])
        method.num_params(entry["num_embeddings"], entry["embedding_dim"])  # which refuses fields that do not fit
    except ValueError as error:
        raise ValueError(f"table {entry['name']!r}: {error}") from None
    if not isinstance(method, RowMethod) or not isinstance(method, (FullTable, *PLANNABLE)):
        known = [FullTable.key, *(each.key for each in PLANNABLE)]
        raise ValueError(
            f"table {entry['name']!r} has method {entry['method']!r}, which is not simulated: take one of {known}."
        )
    return method
