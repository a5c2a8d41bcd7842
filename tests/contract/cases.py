"""What the contract is checked on: every method of the registry, every choice it offers, several sizes and budgets."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cce_torchrec import METHODS, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.lowering import DecodedTable, LoweredTable, Table
from cce_torchrec.methods import MethodConfig


class Variant(NamedTuple):
    """A method with its choices (fields of a ``Literal`` or ``bool`` type, such as QR's operation) fixed."""

    key: str
    overrides: dict[str, Any]

    @property
    def method(self) -> type[MethodConfig]:
        return METHODS[self.key]

    def from_budget(self, num_embeddings: int, embedding_dim: int, num_params: int) -> MethodConfig:
        return self.method.from_budget(num_embeddings, embedding_dim, num_params, **self.overrides)

    def __str__(self) -> str:
        return "-".join([self.key, *map(str, self.overrides.values())])


def _variants() -> Iterator[Variant]:
    for key, method in METHODS.items():
        hints = get_type_hints(method)
        choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
        choices |= {name: (True,) for name, hint in hints.items() if hint is bool}  # they are off by default
        yield Variant(key, {})
        for name, values in choices.items():
            yield from (Variant(key, {name: value}) for value in values)
        if "num_hot_ids" in hints:
            yield Variant(key, {"num_hot_ids": 3})


VARIANTS = list(_variants())


def smallest_budget(variant: Variant, num_embeddings: int, embedding_dim: int) -> int:
    """The smallest budget, as the method's own error message names it."""
    try:
        variant.from_budget(num_embeddings, embedding_dim, 0)
    except ValueError as error:
        return int(re.findall(r"\d+", str(error))[-1])
    raise AssertionError(f"{variant} fits in a budget of 0 parameters")


def budgets(variant: Variant, num_embeddings: int, embedding_dim: int) -> list[int]:
    """The smallest one, one that no row width divides, and generous ones."""
    smallest, full = smallest_budget(variant, num_embeddings, embedding_dim), num_embeddings * embedding_dim
    return sorted(
        {
            smallest,
            smallest + 1,
            smallest + 3 * embedding_dim + 1,
            max(smallest, full // 3),
            max(smallest, 2 * full + 7),
        }
    )


def make_table(method: MethodConfig, name: str = "t", **fields: Any) -> CompressedEmbeddingBagConfig:
    defaults = {"num_embeddings": 50, "embedding_dim": 8, "feature_names": [f"f_{name}"]}
    return CompressedEmbeddingBagConfig(name=name, method=method, **(defaults | fields))


def parameters(collection: CompressedEmbeddingBagCollection) -> dict[str, Tensor]:
    """Every trainable tensor of the collection: codebooks by physical table, dense parameters by their names."""
    return {
        name.split(".")[-2] if ".embedding_bags." in name else name: parameter
        for name, parameter in collection.named_parameters()
    }


def table_of(collection: CompressedEmbeddingBagCollection, name: str) -> Table:
    tables: list[Table] = [*collection.lowered_tables, *collection.decoded_tables]
    return next(table for table in tables if table.name == name)


def is_bounded(table: Table) -> bool:
    return (table.decoder if isinstance(table, DecodedTable) else table.row_map).bounded


def decode(collection: CompressedEmbeddingBagCollection, table: str, weights: dict[str, Tensor]) -> Tensor:
    """Every id's vector from ``weights``, by the definition in methods/base.py, an id, a column and a row at a time."""
    lowered = table_of(collection, table)
    dense = functional(lowered, weights)
    if isinstance(lowered, DecodedTable):
        assert dense is not None
        return torch.cat([dense(torch.tensor([number])) for number in range(lowered.config.num_embeddings)])
    sums_Vd = _sums(lowered, weights)
    return sums_Vd if dense is None else dense(sums_Vd)


def functional(table: Table, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The decoder or projection of a table as a function, with parameters from ``weights`` and computing in their type."""
    if table.dense_part is None:
        return None
    prefix = f"_decoders.{table.name}."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    part = copy.deepcopy(table.dense_part)
    return lambda tensor: torch.func.functional_call(part, own, (tensor,))


def _sums(lowered: LoweredTable, weights: dict[str, Tensor]) -> Tensor:
    """The sums of rows of every id."""
    vectors = []
    for number in range(lowered.config.num_embeddings):
        row_map, ids = lowered.row_map, torch.tensor([number])
        rows_C1R = row_map.rows(ids)
        factors_C1R = (
            row_map.row_weights(ids).expand(rows_C1R.shape) if row_map.has_row_weights else torch.ones_like(rows_C1R)
        )
        columns = []
        for name, (rows,), (factors,) in zip(
            lowered.physical_names, rows_C1R.tolist(), factors_C1R.tolist(), strict=True
        ):
            column = weights[name][rows[0]] * factors[0]
            for row, factor in zip(rows[1:], factors[1:], strict=True):
                column = column + weights[name][row] * factor
            columns.append(column)
        vectors.append(torch.cat(columns) * lowered.row_map.scale)
    return torch.stack(vectors)
