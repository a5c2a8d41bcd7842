"""TorchRec's planner knows physical tables; users know logical ones. This translates."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.lowering import LoweredTable


def parameter_constraints(
    module: nn.Module, constraints: Mapping[str, ParameterConstraints] | None = None
) -> dict[str, ParameterConstraints]:
    """Constraints for ``EmbeddingShardingPlanner``, given by logical table name and returned by physical table name.

    Column i of a table t is the physical table ``t:i``; each id costs R lookups in it, so pooling factors are multiplied
    by R. Give the planner the result even without constraints of your own: it does not know R otherwise. Constraints of
    names that are not compressed tables are passed on as they are, for plain collections in the same model.

    Args:
        module: the unsharded model, or a collection.
        constraints: TorchRec's constraints by logical table; pooling factors count ids.

    Returns:
        TorchRec's constraints by physical table, for every compressed table of the model.

    Raises:
        ValueError: where a name is no table of the model, a list is not as long as the table has features, a table whose
            assignments are sharded by id may not be data-parallel, or ``device_group`` is given (the planner of another
            device would drop the table without a word).

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> collection = CompressedEmbeddingBagCollection(tables=[table])
        >>> constraints = parameter_constraints(collection, {"t": ParameterConstraints(pooling_factors=[3.0])})
        >>> {name: constraint.pooling_factors for name, constraint in constraints.items()}
        {'t:0': [6.0], 't:1': [6.0]}
    """
    given = dict(constraints or {})
    lowered = [
        table
        for collection in module.modules()
        if isinstance(collection, CompressedEmbeddingBagCollection)
        for table in collection.lowered_tables
    ]
    plain = _plain_tables(module)
    unknown = [name for name in given if name not in plain and name not in {table.name for table in lowered}]
    if unknown:
        raise ValueError(f"There is no table {unknown}; the tables are {[t.name for t in lowered] + sorted(plain)}.")
    translated = {name: constraint for name, constraint in given.items() if name in plain}
    for table in lowered:
        constraint = _translate(table, given.get(table.name))
        translated.update({name: replace(constraint) for name in table.physical_names})
    return translated


def _plain_tables(module: nn.Module) -> set[str]:
    """Tables of collections that are not ours."""
    inner = {
        id(part)
        for collection in module.modules()
        if isinstance(collection, CompressedEmbeddingBagCollection)
        for part in collection.modules()
    }
    names: set[str] = set()
    for part in module.modules():
        for method in ("embedding_bag_configs", "embedding_configs"):
            if id(part) not in inner and hasattr(part, method):
                names.update(config.name for config in getattr(part, method)())
    return names


def _translate(table: LoweredTable, given: ParameterConstraints | None) -> ParameterConstraints:
    num_features = len(table.config.feature_names)
    constraint = given or ParameterConstraints(pooling_factors=[1.0] * num_features)
    if constraint.device_group is not None:
        raise ValueError(
            f"Table {table.name!r}: device_group={constraint.device_group!r} is not supported, since a planner for another "
            "device drops the table without a word. Leave it out."
        )
    for name in ("pooling_factors", "num_poolings", "batch_sizes"):
        values = getattr(constraint, name)
        if values is not None and len(values) != num_features:
            raise ValueError(f"Table {table.name!r}: {name} has {len(values)} values for {num_features} features.")
    factors = [factor * table.row_map.rows_per_id for factor in constraint.pooling_factors]
    return replace(
        constraint, pooling_factors=factors, feature_names=None, sharding_types=_sharding_types(table, constraint)
    )


def _sharding_types(table: LoweredTable, constraint: ParameterConstraints) -> list[str] | None:
    """Replicated codebooks where assignments are sharded by id."""
    types = constraint.sharding_types
    if not has_sharded_assignments(table.config):
        return types
    if types is not None and ShardingType.DATA_PARALLEL.value not in types:
        raise ValueError(
            f"Table {table.name!r} has assignment_placement='sharded', which needs 'data_parallel' codebooks, but "
            f"sharding_types={types}. Allow it, or replicate the assignments."
        )
    return [ShardingType.DATA_PARALLEL.value]
