"""Which tables are compressed, and how small: what users write."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.memory import stored_bytes
from cce_torchrec.methods import METHODS, MethodConfig
from cce_torchrec.methods.base import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class CompressionRule:
    """Which tables a method applies to, and how small it makes them.

    A table matches where it has at least ``min_num_embeddings`` ids and ``tables`` matches its whole name.

    Args:
        method: a key of :data:`cce_torchrec.METHODS`.
        min_num_embeddings: smaller tables do not match.
        tables: a regular expression over table names.
        compression: the table's parameters divided by this are its budget; or
        num_params: its budget in parameters; or
        budget_bytes: its budget in stored bytes, float32 parameters and assignments; or none, where ``options`` fix its size.
        options: fields of the method's config.

    Raises:
        ValueError: an unknown method, several budgets at once, a ratio below 1, numbers that are none.

    Example:
        >>> CompressionRule(method="cce", min_num_embeddings=10_000, compression=16).matches("t_item", 1_000_000)
        True
    """

    method: str
    min_num_embeddings: int = 0
    tables: str = ".*"
    compression: float | None = None
    num_params: int | None = None
    budget_bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; the methods are {', '.join(METHODS)}.")
        budgets = [f"{name}={getattr(self, name)}" for name in _BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(
                f"{' and '.join(budgets)} are {'two' if len(budgets) == 2 else 'three'} budgets: give one."
            )
        check_not_negative(min_num_embeddings=self.min_num_embeddings)
        check_positive(**{name: getattr(self, name) for name in _COUNTS if getattr(self, name) is not None})
        if self.compression is not None and not (isinstance(self.compression, int | float) and self.compression >= 1):
            raise ValueError(f"compression={self.compression!r} is below 1 or not a number; 16 is 16 times smaller.")
        try:
            re.compile(self.tables)
        except (re.error, TypeError) as error:
            raise ValueError(f"tables={self.tables!r} is not a regular expression: {error}.") from None
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options={self.options!r} is no mapping of fields, such as {{num_columns: 4}}.")
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
        if self.budget_bytes is not None:
            return self._within_bytes(num_embeddings, embedding_dim, self.budget_bytes)
        try:
            return method(**self.options)
        except TypeError as error:
            raise ValueError(
                f"{self.method!r} needs a size: give compression, num_params, budget_bytes, or options ({error})."
            ) from None

    def _within_bytes(self, num_embeddings: int, embedding_dim: int, budget_bytes: int) -> MethodConfig:
        """The largest instance whose parameters and assignments fit in a number of bytes, by bisection."""
        method, full_params = METHODS[self.method], num_embeddings * embedding_dim

        def stored(num_params: int) -> int | None:
            try:
                found = method.from_budget(num_embeddings, embedding_dim, num_params, **self.options)
            except ValueError:
                return None
            return stored_bytes(found, num_embeddings, embedding_dim)

        smallest = _first(1, full_params, lambda num_params: stored(num_params) is not None)
        least = stored(smallest)
        if least is None:  # not even with as many parameters as the full table: let it say why
            return method.from_budget(num_embeddings, embedding_dim, full_params, **self.options)
        if least > budget_bytes:
            raise ValueError(
                f"budget_bytes={budget_bytes:,} is too small for {self.method!r} with {num_embeddings:,} ids; the smallest "
                f"possible is {least:,}."
            )
        too_large = _first(smallest, full_params + 1, lambda n: n > full_params or (stored(n) or 0) > budget_bytes)
        return method.from_budget(num_embeddings, embedding_dim, too_large - 1, **self.options)


_COUNTS = ("num_params", "budget_bytes")
_BUDGETS = ("compression", *_COUNTS)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first of ``low`` .. ``high`` from which on something holds; ``high`` where it never does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@runtime_checkable
class CompressionPlan(Protocol):
    """Anything that has chosen a method config by table name, for tables of certain sizes."""

    methods: Mapping[str, MethodConfig]

    def method_for(self, table: EmbeddingBagConfig) -> MethodConfig | None:
        """The method of a table; a ``ValueError`` where it is not of the size that was planned."""


Rules = Mapping[str, MethodConfig] | Sequence[CompressionRule] | CompressionPlan


def choose(config: EmbeddingBagConfig, rules: Rules) -> MethodConfig | None:
    """The method of one table, or ``None`` where it stays full."""
    if isinstance(rules, CompressionPlan):
        return rules.method_for(config)
    if isinstance(rules, Mapping):
        return rules.get(config.name)
    matching = (rule for rule in rules if rule.matches(config.name, config.num_embeddings))
    rule = next(matching, None)
    return None if rule is None else rule.method_for(config.num_embeddings, config.embedding_dim)
