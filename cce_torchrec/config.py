"""The config of a compressed table: TorchRec's own, plus a method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.methods import FullTable, MethodConfig


@dataclass
class CompressedEmbeddingBagConfig(EmbeddingBagConfig):
    """TorchRec's ``EmbeddingBagConfig`` with a compression ``method``; all other fields describe the *logical* table.

    Args:
        method: a config from :data:`cce_torchrec.METHODS`; the full table by default.

    Example:
        >>> from cce_torchrec.methods import CCE
        >>> config = CompressedEmbeddingBagConfig(
        ...     name="t_item", num_embeddings=1_000_000, embedding_dim=64, feature_names=["item"], method=CCE(num_rows=1024)
        ... )
        >>> config.method.num_params(config.num_embeddings, config.embedding_dim)
        131072
    """

    method: MethodConfig = field(default_factory=FullTable)


def method_of(config: EmbeddingBagConfig) -> MethodConfig:
    """The method of a table; a plain ``EmbeddingBagConfig`` is a full table."""
    return config.method if isinstance(config, CompressedEmbeddingBagConfig) else FullTable()


def check_tables(tables: Sequence[EmbeddingBagConfig]) -> None:
    """Raise a ``ValueError`` for duplicate table names and for sizes or methods that cannot be."""
    for name, count in Counter(table.name for table in tables).items():
        if count > 1:
            raise ValueError(f"Duplicate table name {name!r} ({count} tables): give each table a name of its own.")
    for table in tables:
        if table.num_embeddings < 1 or table.embedding_dim < 1:
            raise ValueError(
                f"Table {table.name!r} has num_embeddings={table.num_embeddings}, embedding_dim={table.embedding_dim}; "
                "both must be at least 1."
            )
        if not isinstance(method_of(table), MethodConfig):
            raise ValueError(
                f"Table {table.name!r} has method={method_of(table)!r}, which is not a method config; "
                "take one from cce_torchrec.METHODS, such as CCE(num_rows=1024)."
            )
        try:
            method_of(table).num_params(table.num_embeddings, table.embedding_dim)
        except ValueError as error:
            raise ValueError(f"Table {table.name!r}: {error}") from None
