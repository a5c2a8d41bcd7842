"""A logical table as physical ones: column i of table ``t`` is an ordinary TorchRec table ``t:i`` with features ``f:i``.

Tables of one column keep their names, so a full table looks just as in TorchRec's own collection.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from cce_torchrec.config import method_of
from cce_torchrec.methods import RowMap, RowMethod


def _scaled_init(init_fn: Callable[[Tensor], Tensor | None], factor: float, weight: Tensor) -> Tensor:
    """Initialise rows so that the vectors made of them have the variance of ``init_fn``."""
    with torch.no_grad():
        init_fn(weight)
        return weight.mul_(factor)


@dataclass(frozen=True)
class LoweredTable:
    """One logical table, its id -> rows function, and what both become in the inner collection.

    Args:
        config: the logical config.
        row_map: ids to physical rows.
        embedding_names: name of each feature's output: the feature's own, or ``f@t`` where several tables share it.
    """

    config: EmbeddingBagConfig
    row_map: RowMap
    embedding_names: list[str]

    @property
    def name(self) -> str:
        """Of the logical table."""
        return self.config.name

    def _column_name(self, name: str, column: int) -> str:
        return name if len(self.row_map.columns) == 1 else f"{name}:{column}"

    @cached_property
    def physical_names(self) -> list[str]:
        """Names of the physical tables, column by column."""
        return [self._column_name(self.name, column) for column in range(len(self.row_map.columns))]

    @property
    def is_mean(self) -> bool:
        """Whether pooled outputs are divided by the length of their bag."""
        return self.config.pooling == PoolingType.MEAN

    def output_names(self, feature: int) -> list[str]:
        """Names of the physical features whose outputs, side by side, are that of logical feature ``feature``."""
        # '@' in a feature's name means something to TorchRec: a feature that several of *its* tables share.
        name = self.embedding_names[feature].replace("@", "#")
        return [self._column_name(name, column) for column in range(len(self.row_map.columns))]

    @cached_property
    def physical_configs(self) -> list[EmbeddingBagConfig]:
        """Configs of the physical tables, column by column; they pool by SUM, a MEAN divides afterwards."""
        assert self.config.init_fn is not None
        factor = self.row_map.rows_per_id**-0.5 / self.row_map.scale
        return [
            EmbeddingBagConfig(
                name=self.physical_names[column],
                num_embeddings=size.num_rows,
                embedding_dim=size.dim,
                data_type=self.config.data_type,
                feature_names=[self.output_names(feature)[column] for feature in range(len(self.embedding_names))],
                weight_init_max=self.config.get_weight_init_max() * factor,
                weight_init_min=self.config.get_weight_init_min() * factor,
                init_fn=self.config.init_fn if factor == 1 else partial(_scaled_init, self.config.init_fn, factor),
            )
            for column, size in enumerate(self.row_map.columns)
        ]


def _row_map(config: EmbeddingBagConfig, device: torch.device | None) -> RowMap:
    """The id -> rows function of a table, with an empty buffer whose *name* says what it is.

    A checkpoint of something else then lacks that name, and loading it fails before anything is read.
    """
    method = method_of(config)
    assert isinstance(method, RowMethod)
    row_map = method.row_map(config.name, config.num_embeddings, config.embedding_dim, device)
    layout = method.layout(config.num_embeddings, config.embedding_dim).replace(".", ",")
    row_map.register_buffer(layout, torch.empty(0, dtype=torch.uint8, device=device))
    return row_map


def check_layouts(tables: Sequence[LoweredTable], state: Mapping[str, Any], prefix: str) -> None:
    """Raise a ``ValueError`` where a state dict was saved from tables of another method or size.

    Args:
        tables: of the collection that is to load it.
        state: its keys.
        prefix: what the keys of the row maps begin with.
    """
    for table in tables:
        start = f"{prefix}{table.name}."
        own = next(name for name, _ in table.row_map.named_buffers() if is_layout(name))
        saved = [key.removeprefix(start) for key in state if key.startswith(start) and is_layout(key)]
        if saved and own not in saved:
            raise ValueError(
                f"Table {table.name!r}: the checkpoint was saved from {saved[0]}, but the model has {own}. "
                "Build the model with the checkpoint's method and sizes."
            )


def is_layout(key: str) -> bool:
    """Whether a key of a state dict is the name that says what a table is."""
    return " format " in key


def lower_tables(configs: Sequence[EmbeddingBagConfig], devices: Sequence[torch.device | None]) -> list[LoweredTable]:
    """Build the id -> rows function of every table, on its device, and lay out its physical tables.

    Raises:
        ValueError: where a physical name would stand twice, such as a feature ``f:0`` beside a feature ``f`` of a table
            with several columns.
    """
    for config in configs:
        config.feature_names = config.feature_names or [config.name]
    lowered = [
        LoweredTable(config, _row_map(config, device), embedding_names)
        for config, embedding_names, device in zip(
            configs, get_embedding_names_by_table(list(configs)), devices, strict=True
        )
    ]
    physical = [config for table in lowered for config in table.physical_configs]
    for kind, names in (
        ("table", [config.name for config in physical]),
        ("feature", [feature for config in physical for feature in config.feature_names]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(
                    f"Two {kind}s would be stored as {name!r}: rename the {kind} {name!r} (':' marks columns)."
                )
    return lowered
