"""The config of a compressed table: TorchRec's own, plus a method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.methods import FullTable, MethodConfig

AssignmentPlacement = Literal["replicated", "sharded"]


@dataclass
class CompressedEmbeddingBagConfig(EmbeddingBagConfig):
    """TorchRec's ``EmbeddingBagConfig`` with a compression ``method``; all other fields describe the *logical* table.

    Args:
        method: a config from :data:`cce_torchrec.METHODS`; the full table by default.
        assignment_placement: across ranks, whether each holds the assignments of all ids ("replicated") or of its block
            of ceil(V / ranks) ids ("sharded"), for vocabularies that do not fit. Codebooks of a "sharded" table are
            data-parallel: ids travel to the rank that knows their assignments, and these travel back.

    Example:
        >>> from cce_torchrec.methods import CCE
        >>> config = CompressedEmbeddingBagConfig(
        ...     name="t_item", num_embeddings=1_000_000, embedding_dim=64, feature_names=["item"], method=CCE(num_rows=1024)
        ... )
        >>> config.method.num_params(config.num_embeddings, config.embedding_dim)
        131072
    """

    method: MethodConfig = field(default_factory=FullTable)
    assignment_placement: AssignmentPlacement = "replicated"


def method_of(config: EmbeddingBagConfig) -> MethodConfig:
    """The method of a table; a plain ``EmbeddingBagConfig`` is a full table."""
    return config.method if isinstance(config, CompressedEmbeddingBagConfig) else FullTable()


def has_sharded_assignments(config: EmbeddingBagConfig) -> bool:
    """Whether each rank holds the assignments of its own block of ids only."""
    return isinstance(config, CompressedEmbeddingBagConfig) and config.assignment_placement == "sharded"


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
        placement = getattr(table, "assignment_placement", "replicated")
        if placement not in get_args(AssignmentPlacement):
            raise ValueError(
                f"Table {table.name!r} has assignment_placement={placement!r}, not one of {get_args(AssignmentPlacement)}."
            )
        if placement == "sharded" and not method_of(table).stores_assignments:
            reason = "decodes where the ids are" if method_of(table).reclusterable else "stores no assignments"
            raise ValueError(
                f"Table {table.name!r} has assignment_placement='sharded', but its method {method_of(table).key!r} {reason}: "
                "leave it 'replicated'."
            )
        num_assigned_ids = getattr(method_of(table), "num_assigned_ids", None)
        if placement == "sharded" and num_assigned_ids is not None:
            raise ValueError(
                f"Table {table.name!r} has assignment_placement='sharded' and num_assigned_ids={num_assigned_ids}: "
                "assignments of some ids only are not sharded by id. Leave them 'replicated', or store those of all ids "
                "(num_assigned_ids=None)."
            )
        try:
            method_of(table).num_params(table.num_embeddings, table.embedding_dim)
        except ValueError as error:
            raise ValueError(f"Table {table.name!r}: {error}") from None
