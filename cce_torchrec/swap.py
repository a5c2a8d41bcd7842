"""Swapping compressed collections into an existing model."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import CompressedEmbeddingBagConfig
from cce_torchrec.methods import METHODS, FullTable, MethodConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompressionRule:
    """Which tables a method applies to, and how small it makes them.

    A table matches where it has at least ``min_num_embeddings`` ids and ``tables`` matches its whole name.

    Args:
        method: a key of :data:`cce_torchrec.METHODS`.
        min_num_embeddings: smaller tables do not match.
        tables: a regular expression over table names.
        compression: the table's parameters divided by this are its budget; or
        num_params: its budget in parameters; or neither, where ``options`` fix its size.
        options: fields of the method's config.

    Raises:
        ValueError: an unknown method, two budgets at once, a ratio below 1.

    Example:
        >>> CompressionRule(method="cce", min_num_embeddings=10_000, compression=16).matches("t_item", 1_000_000)
        True
    """

    method: str
    min_num_embeddings: int = 0
    tables: str = ".*"
    compression: float | None = None
    num_params: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; the methods are {', '.join(METHODS)}.")
        if self.compression is not None and self.num_params is not None:
            raise ValueError(
                f"compression={self.compression} and num_params={self.num_params} are two budgets: give one."
            )
        if self.compression is not None and self.compression < 1:
            raise ValueError(f"compression={self.compression} is below 1, which would enlarge the table.")
        unknown = set(self.options) - {f.name for f in fields(METHODS[self.method])}
        if unknown:
            known = [f.name for f in fields(METHODS[self.method])]
            raise ValueError(f"options {sorted(unknown)} are not fields of {self.method!r}; those are {known}.")

    def matches(self, table: str, num_embeddings: int) -> bool:
        """Whether the rule applies to a table."""
        return num_embeddings >= self.min_num_embeddings and re.fullmatch(self.tables, table) is not None

    def method_for(self, num_embeddings: int, embedding_dim: int) -> MethodConfig:
        """The config for a table of this size."""
        method = METHODS[self.method]
        if self.num_params is not None:
            return method.from_budget(num_embeddings, embedding_dim, self.num_params, **self.options)
        if self.compression is not None:
            budget = int(num_embeddings * embedding_dim / self.compression)
            return method.from_budget(num_embeddings, embedding_dim, budget, **self.options)
        return method(**self.options)


@runtime_checkable
class CompressionPlan(Protocol):
    """Anything that has chosen a method config by table name."""

    methods: Mapping[str, MethodConfig]


Rules = Mapping[str, MethodConfig] | Sequence[CompressionRule] | CompressionPlan


def compress(model: nn.Module, rules: Rules) -> nn.Module:
    """Replace the ``EmbeddingBagCollection``s inside a model by compressed ones; tables that no rule names stay full.

    Trained weights of the tables that stay full are kept; compressed tables start anew, since no id has an assignment yet.
    Do this before sharding. An ``EmbeddingBagCollection`` of which no table changes is left as it is.

    Args:
        model: changed in place; may itself be an ``EmbeddingBagCollection``.
        rules: method configs by table name; or :class:`CompressionRule` s, of which the first that matches counts; or a
            plan with ``methods``.

    Returns:
        The model (a new collection where ``model`` itself was one).

    Raises:
        ValueError: where a named table does not exist, nothing matches, or a budget cannot be met (naming the table).

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> item = EmbeddingBagConfig(name="t_item", num_embeddings=50_000, embedding_dim=16, feature_names=["item"])
        >>> model = torch.nn.Sequential(EmbeddingBagCollection(tables=[item]))
        >>> model = compress(model, [CompressionRule(method="cce", min_num_embeddings=10_000, compression=16)])
        >>> type(model[0]).__name__
        'CompressedEmbeddingBagCollection'
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is EmbeddingBagCollection]
    tables = {config.name: config for _, module in found for config in module.embedding_bag_configs()}
    chosen = _choose(tables, rules)
    if not chosen:
        raise ValueError(
            f"No table is compressed by {rules}; the model's {len(found)} collections have {list(tables)}."
        )
    for name, module in found:
        methods = {c.name: chosen[c.name] for c in module.embedding_bag_configs() if c.name in chosen}
        if not methods:
            continue
        replacement = _replace(module, methods)
        logger.info("Compressed %s: %s", name or type(model).__name__, methods)
        if module is model:
            return replacement
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    return model


def _choose(tables: Mapping[str, EmbeddingBagConfig], rules: Rules) -> dict[str, MethodConfig]:
    """The method of each table that is compressed."""
    if isinstance(rules, CompressionPlan):
        rules = rules.methods
    if isinstance(rules, Mapping):
        unknown = [name for name in rules if name not in tables]
        if unknown:
            raise ValueError(f"There is no table {unknown}; the model's tables are {list(tables)}.")
        return dict(rules)
    chosen = {}
    for name, config in tables.items():
        rule = next((rule for rule in rules if rule.matches(name, config.num_embeddings)), None)
        if rule is not None:
            try:
                chosen[name] = rule.method_for(config.num_embeddings, config.embedding_dim)
            except ValueError as error:
                raise ValueError(f"Table {name!r}: {error}") from None
    return chosen


@torch.no_grad()
def _replace(
    collection: EmbeddingBagCollection, methods: Mapping[str, MethodConfig]
) -> CompressedEmbeddingBagCollection:
    tables = [
        CompressedEmbeddingBagConfig(
            **{f.name: getattr(config, f.name) for f in fields(config)}, method=methods.get(config.name, FullTable())
        )
        for config in collection.embedding_bag_configs()
    ]
    replacement = CompressedEmbeddingBagCollection(tables, collection.is_weighted(), collection.device)
    replacement.train(collection.training)
    if collection.device != torch.device("meta"):
        for table in tables:
            if isinstance(table.method, FullTable):
                replacement.codebook(table.name).copy_(collection.embedding_bags[table.name].weight)
    return replacement
