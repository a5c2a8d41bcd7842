"""TorchRec's planner knows physical tables; users know logical ones. This translates."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods import Column


def parameter_constraints(
    module: nn.Module,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    *,
    batch_size: int | None = None,
) -> dict[str, ParameterConstraints]:
    """Constraints for ``EmbeddingShardingPlanner``, given by logical table name and returned by physical table name.

    Column i of a table t is the physical table ``t:i``; each id costs R lookups in it, so pooling factors are multiplied
    by R. Give the planner the result even without constraints of your own: it does not know R otherwise. Constraints of
    names that are not compressed tables are passed on as they are, for plain collections in the same model. Those of decode
    tables come to nothing: the planner places no table that TorchRec replicates with the dense layers.

    With a ``batch_size``, codebooks that are cheaper to replicate are constrained to data_parallel: those whose gradients
    are fewer bytes to all-reduce than their features' ids and pooled vectors are to send there and back. A step sends, a
    rank of W and a codebook of dims d:

        data_parallel:  (W-1)/W * 2 * num_rows * d * 4                           a float32 gradient, in a ring
        table_wise:     (W-1)/W * B * sum over features of (2 * d * 4 + n * 8)   a pooled vector, its gradient, n int64 ids

    so W does not matter. TorchRec's own model of costs does not see this: it gives small codebooks away by rows. Replicated
    codebooks train by an optimizer that was applied in backward, or a dense one; ``fused_params`` do not reach them.

    Args:
        module: the unsharded model, or a collection.
        constraints: TorchRec's constraints by logical table; pooling factors count ids.
        batch_size: B, examples a rank and step (``batch_sizes`` of a constraint have precedence); ``None`` to constrain
            no codebook for its size. Tables with ``sharding_types`` of their own, or ``compute_kernels`` that cannot be
            replicated, are left alone.

    Returns:
        TorchRec's constraints by physical table, for every compressed table of the model.

    Raises:
        ValueError: where a name is no table of the model, a list is not as long as the table has features, a table whose
            assignments are sharded by id may not be data-parallel, ``batch_size`` is not positive, or ``device_group`` is
            given (the planner of another device would drop the table without a word).

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> collection = CompressedEmbeddingBagCollection(tables=[table])
        >>> constraints = parameter_constraints(collection, {"t": ParameterConstraints(pooling_factors=[3.0])})
        >>> {name: constraint.pooling_factors for name, constraint in constraints.items()}
        {'t:0': [6.0], 't:1': [6.0]}
        >>> parameter_constraints(collection, batch_size=1024)["t:0"].sharding_types
        ['data_parallel']
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive; give the batch size of one rank.")
    given = dict(constraints or {})
    lowered, plain = _lowered_tables(module), _plain_tables(module)
    _check_names(given, module, plain)
    translated = {name: constraint for name, constraint in given.items() if name in plain}
    for table in lowered:
        wish = _fill_in(table, given.get(table.name))
        for name, column in zip(table.physical_names, table.row_map.columns, strict=True):
            translated[name] = _translate(table, column, wish, batch_size)
    return translated


def _compressed(module: nn.Module) -> list[CompressedEmbeddingBagCollection]:
    return [part for part in module.modules() if isinstance(part, CompressedEmbeddingBagCollection)]


def _lowered_tables(module: nn.Module) -> list[LoweredTable]:
    return [table for collection in _compressed(module) for table in collection.lowered_tables]


def _check_names(given: Mapping[str, ParameterConstraints], module: nn.Module, plain: set[str]) -> None:
    """Whether every table that is named is there, decode tables included."""
    logical = [config.name for collection in _compressed(module) for config in collection.embedding_bag_configs()]
    known = logical + sorted(plain)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"There is no table {unknown}; the tables are {known}.")


def _plain_tables(module: nn.Module) -> set[str]:
    """Tables of collections that are not ours."""
    inner = {id(part) for collection in _compressed(module) for part in collection.modules()}
    names: set[str] = set()
    for part in module.modules():
        for method in ("embedding_bag_configs", "embedding_configs"):
            if id(part) not in inner and hasattr(part, method):
                names.update(config.name for config in getattr(part, method)())
    return names


def _fill_in(table: LoweredTable, given: ParameterConstraints | None) -> ParameterConstraints:
    """A constraint with a pooling factor for every feature."""
    num_features = len(table.config.feature_names)
    constraint = given or ParameterConstraints()
    if constraint.device_group is not None:
        raise ValueError(
            f"Table {table.name!r}: device_group={constraint.device_group!r} is not supported, since a planner for another "
            "device drops the table without a word. Leave it out."
        )
    if constraint.pooling_factors == ParameterConstraints().pooling_factors:  # as if nothing was said about them
        constraint = replace(constraint, pooling_factors=constraint.pooling_factors * num_features)
    for name in ("pooling_factors", "num_poolings", "batch_sizes"):
        values = getattr(constraint, name)
        if values is not None and len(values) != num_features:
            raise ValueError(f"Table {table.name!r}: {name} has {len(values)} values for {num_features} features.")
    return constraint


def _translate(
    table: LoweredTable, column: Column, wish: ParameterConstraints, batch_size: int | None
) -> ParameterConstraints:
    """The constraint of one codebook, from that of its table."""
    factors = [factor * table.row_map.rows_per_id for factor in wish.pooling_factors]
    types = _sharding_types(table, wish)
    if types is None and batch_size is not None and _replicating_sends_less(column, wish, batch_size):
        types = [ShardingType.DATA_PARALLEL.value]
    return replace(wish, pooling_factors=factors, feature_names=None, sharding_types=types)


def _replicating_sends_less(column: Column, wish: ParameterConstraints, batch_size: int) -> bool:
    """Whether the gradients of a codebook are fewer bytes than the ids and pooled vectors of its features.

    Both without the factor (W-1)/W that they have in common.
    """
    if wish.compute_kernels is not None and EmbeddingComputeKernel.DENSE.value not in wish.compute_kernels:
        return False
    num_features = len(wish.pooling_factors)
    bags_F = [
        batch * poolings
        for batch, poolings in zip(
            wish.batch_sizes or [batch_size] * num_features, wish.num_poolings or [1.0] * num_features, strict=True
        )
    ]
    vector_bytes = column.dim * 4
    all_to_all = sum(
        bags * (2 * vector_bytes + ids * 8) for bags, ids in zip(bags_F, wish.pooling_factors, strict=True)
    )
    return 2 * column.num_rows * vector_bytes < all_to_all


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
