"""A logical table as physical ones: column i of table ``t`` is an ordinary TorchRec table ``t:i`` with features ``f:i``.

Tables of one column keep their names, so a full table looks just as in TorchRec's own collection. Tables of decode methods
have no physical tables, but a decoder.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from cce_torchrec.config import method_of
from cce_torchrec.methods import (
    DecodeMethod,
    Decoder,
    DensePart,
    MethodConfig,
    Projection,
    RowMap,
    RowMethod,
    TableSpec,
)

LAYOUT_HOLDERS = ("_row_maps", "_decoders")  # attributes of a collection whose modules say what a table is
LAYOUT_REMEDY = (
    "Build the model with the checkpoint's method and sizes; if the vocabulary has grown, load first, then grow."
)
_SAMPLED_ELEMENTS = 1 << 22  # of a table's init, where its size is estimated


def _scaled_init(init_fn: Callable[[Tensor], Tensor | None], factor: float, weight: Tensor) -> Tensor:
    """Initialise rows so that the vectors made of them have the variance of ``init_fn``."""
    with torch.no_grad():
        init_fn(weight)
        return weight.mul_(factor)


@dataclass(frozen=True)
class _Table:
    """One logical table.

    Args:
        config: the logical config.
        embedding_names: name of each feature's output: the feature's own, or ``f@t`` where several tables share it.
    """

    config: EmbeddingBagConfig
    embedding_names: list[str]

    @property
    def name(self) -> str:
        """Of the logical table."""
        return self.config.name

    @property
    def is_mean(self) -> bool:
        """Whether pooled outputs are divided by the length of their bag."""
        return self.config.pooling == PoolingType.MEAN


@dataclass(frozen=True)
class DecodedTable(_Table):
    """One logical table of a decode method.

    Args:
        decoder: ids to vectors.
    """

    decoder: Decoder

    @property
    def id_map(self) -> Decoder:
        """What stores something by id, if anything does."""
        return self.decoder

    @property
    def dense_part(self) -> DensePart:
        """What TorchRec replicates."""
        return self.decoder

    def stored_bytes(self) -> int:
        """Bytes of everything stored beside the parameters."""
        return self.decoder.stored_bytes()


@dataclass(frozen=True)
class LoweredTable(_Table):
    """One logical table, its id -> rows function, and what both become in the inner collection.

    Args:
        row_map: ids to physical rows.
        projection: from sums of rows to vectors, where sums are not the vectors themselves.
    """

    row_map: RowMap
    projection: Projection | None = None

    @property
    def id_map(self) -> RowMap:
        """What stores something by id, if anything does."""
        return self.row_map

    @property
    def dense_part(self) -> DensePart | None:
        """What TorchRec replicates, where there is such a thing."""
        return self.projection

    def stored_bytes(self) -> int:
        """Bytes of everything stored beside the parameters."""
        return self.row_map.stored_bytes() + (self.projection.stored_bytes() if self.projection else 0)

    @property
    def width(self) -> int:
        """Dims of the columns side by side."""
        return sum(column.dim for column in self.row_map.columns)

    def _column_name(self, name: str, column: int) -> str:
        return name if len(self.row_map.columns) == 1 else f"{name}:{column}"

    @cached_property
    def physical_names(self) -> list[str]:
        """Names of the physical tables, column by column."""
        return [self._column_name(self.name, column) for column in range(len(self.row_map.columns))]

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


Table = LoweredTable | DecodedTable


def _register_layout(
    module: nn.Module, method: MethodConfig, config: EmbeddingBagConfig, device: torch.device | None
) -> None:
    """Give a row map or a decoder an empty buffer whose *name* says what it is.

    A checkpoint of something else then lacks that name, and loading it fails before anything is read.
    """
    layout = method.layout(config.num_embeddings, config.embedding_dim).replace(".", ",")
    module.register_buffer(layout, torch.empty(0, dtype=torch.uint8, device=device))


def rename_layout(table: Table) -> None:
    """Say anew what a table is, after its config has changed."""
    old = next(name for name, _ in table.id_map.named_buffers() if is_layout(name))
    device = table.id_map.get_buffer(old).device
    delattr(table.id_map, old)
    _register_layout(table.id_map, method_of(table.config), table.config, device)


def _initial_size(config: EmbeddingBagConfig) -> float:
    """Root mean square of the elements of a full table's initial weight.

    That of TorchRec's default is known; a custom ``init_fn`` is tried on as many rows as fit a few million elements.
    """
    init_fn = config.init_fn
    if isinstance(init_fn, partial) and init_fn.func is nn.init.uniform_ and {"a", "b"} <= init_fn.keywords.keys():
        low, high = init_fn.keywords["a"], init_fn.keywords["b"]
        return ((low * low + low * high + high * high) / 3) ** 0.5
    assert init_fn is not None
    rows = max(1, min(config.num_embeddings, _SAMPLED_ELEMENTS // config.embedding_dim))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sample = torch.empty(rows, config.embedding_dim, device="cpu")
        init_fn(sample)
    return float(sample.square().mean().sqrt())


def _spec(config: EmbeddingBagConfig, device: torch.device | None) -> TableSpec:
    return TableSpec(
        name=config.name,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        std=_initial_size(config),
        dtype=data_type_to_dtype(config.data_type),
        device=device,
    )


def _lower(
    config: EmbeddingBagConfig, embedding_names: list[str], method: RowMethod, device: torch.device | None
) -> LoweredTable:
    row_map = method.row_map(config.name, config.num_embeddings, config.embedding_dim, device)
    _register_layout(row_map, method, config, device)
    has_projection = type(method).projection is not RowMethod.projection
    projection = method.projection(_spec(config, device)) if has_projection else None
    return LoweredTable(config, embedding_names, row_map, projection)


def check_layouts(tables: Sequence[Table], state: Mapping[str, Any], prefix: str) -> None:
    """Raise a ``ValueError`` where a state dict was saved from tables of another method or size.

    Args:
        tables: of the collection that is to load it.
        state: its keys.
        prefix: what the keys of the collection begin with.
    """
    for table in tables:
        own = next(name for name, _ in table.id_map.named_buffers() if is_layout(name))
        starts = tuple(f"{prefix}{part}.{table.name}." for part in LAYOUT_HOLDERS)
        saved = [key.rpartition(".")[2] for key in state if key.startswith(starts) and is_layout(key)]
        if saved and own not in saved:
            raise ValueError(
                f"Table {table.name!r}: the checkpoint was saved from {saved[0]}, but the model has {own}. "
                + LAYOUT_REMEDY
            )


def is_layout(key: str) -> bool:
    """Whether a key of a state dict is the name that says what a table is."""
    return " format " in key


def _embedding_names(configs: Sequence[EmbeddingBagConfig]) -> list[list[str]]:
    """Names of the outputs of every table; a table without features has one of its own name."""
    for config in configs:
        config.feature_names = config.feature_names or [config.name]
    return get_embedding_names_by_table(list(configs))


def decoded_tables(configs: Sequence[EmbeddingBagConfig], device: torch.device | None) -> list[DecodedTable]:
    """Build the id -> vector function of every table of a decode method."""
    decoded = []
    for config, embedding_names in zip(configs, _embedding_names(configs), strict=True):
        method = method_of(config)
        if isinstance(method, DecodeMethod):
            decoder = method.decoder(_spec(config, device))
            _register_layout(decoder, method, config, device)
            decoded.append(DecodedTable(config, embedding_names, decoder))
    return decoded


def lower_tables(configs: Sequence[EmbeddingBagConfig], devices: Sequence[torch.device | None]) -> list[LoweredTable]:
    """Build the id -> rows function of every table of a row method, on its device, and lay out its physical tables.

    Raises:
        ValueError: where a physical name would stand twice, such as a feature ``f:0`` beside a feature ``f`` of a table
            with several columns.
    """
    lowered = [
        _lower(config, embedding_names, method, device)
        for config, embedding_names, device in zip(configs, _embedding_names(configs), devices, strict=True)
        if isinstance(method := method_of(config), RowMethod)
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
