"""Choose a method config for every table, so that all tables together stay within a parameter budget."""

from collections.abc import Mapping

from cce_torchrec import METHODS, CompressedEmbeddingBagConfig
from cce_torchrec.methods import DecodeMethod, FullTable, MethodConfig
from dlrm_example.config import OptionValue, TrainConfig, UsageError
from dlrm_example.data import DatasetInfo, SparseFeature


def plan_tables(info: DatasetInfo, config: TrainConfig) -> list[CompressedEmbeddingBagConfig]:
    """One table a feature. Tables with few rows stay full; the others share what is left, in proportion to their rows.

    Raises:
        UsageError: the budget is too small; it names the largest compression that works.
    """
    try:
        methods = _methods(info, config, config.compression)
    except ValueError as error:
        largest = _largest_compression(info, config)
        remedy = f"at most {largest:.4g} works here" if largest else "no compression works with these options"
        flags = f"--compression {config.compression:g} with --method {config.method}"
        raise UsageError(f"{flags}: {error} ({remedy})") from None
    tables = [_table(feature, methods[feature.name], config.embedding_dim) for feature in info.sparse_features]
    for table in tables:
        _check_columns(table)
    return tables


def num_params(tables: list[CompressedEmbeddingBagConfig]) -> int:
    """Trainable parameters of all tables together."""
    return sum(table.method.num_params(table.num_embeddings, table.embedding_dim) for table in tables)


def full_params(info: DatasetInfo, embedding_dim: int) -> int:
    """Parameters of all tables together, were they full."""
    return sum(feature.num_embeddings for feature in info.sparse_features) * embedding_dim


def _methods(info: DatasetInfo, config: TrainConfig, compression: float) -> dict[str, MethodConfig]:
    if config.method == "full":
        return {feature.name: FullTable() for feature in info.sparse_features}
    large = [feature for feature in info.sparse_features if feature.num_embeddings >= config.min_compressed_rows]
    if not large:
        raise ValueError(f"no table has --min_compressed_rows {config.min_compressed_rows} rows, so none is compressed")
    large_rows = sum(feature.num_embeddings for feature in large)
    all_params = full_params(info, config.embedding_dim)
    small_params = all_params - large_rows * config.embedding_dim
    left = int(all_params / compression) - small_params
    if left <= 0:
        raise ValueError(f"the tables below --min_compressed_rows stay full and alone have {small_params} parameters")
    methods: dict[str, MethodConfig] = {feature.name: FullTable() for feature in info.sparse_features}
    for feature in large:
        methods[feature.name] = _fit(feature, left * feature.num_embeddings // large_rows, config)
    return methods


def _fit(feature: SparseFeature, budget: int, config: TrainConfig) -> MethodConfig:
    """The largest instance of the method within the budget; where it hashes, seeded by the run's seed."""
    method = METHODS[config.method]
    seed = {"seed": config.seed} if "seed" in method.__dataclass_fields__ else {}
    overrides: Mapping[str, OptionValue] = {**seed, **config.method_options}
    try:
        return method.from_budget(feature.num_embeddings, config.embedding_dim, budget, **overrides)
    except ValueError as error:
        raise ValueError(f"table {feature.name!r}, whose share is {budget} parameters: {error}") from None


def _largest_compression(info: DatasetInfo, config: TrainConfig) -> float | None:
    """By bisection, or None where even compression 1 fails."""

    def works(compression: float) -> bool:
        try:
            _methods(info, config, compression)
        except ValueError:
            return False
        return True

    low, high = 1.0, config.compression
    if not works(low):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _check_columns(table: CompressedEmbeddingBagConfig) -> None:
    columns = getattr(table.method, "num_columns", 1)
    looks_up_rows = not isinstance(table.method, DecodeMethod)  # columns of the others are no tables of FBGEMM's
    if looks_up_rows and table.embedding_dim // columns % 4:
        raise UsageError(
            f"--method_options num_columns={columns}: FBGEMM's kernels take no columns of {table.embedding_dim // columns} "
            f"dims; --embedding_dim {table.embedding_dim} over num_columns must be a multiple of 4"
        )


def _table(feature: SparseFeature, method: MethodConfig, embedding_dim: int) -> CompressedEmbeddingBagConfig:
    return CompressedEmbeddingBagConfig(
        name=f"t_{feature.name}",
        feature_names=[feature.name],
        num_embeddings=feature.num_embeddings,
        embedding_dim=embedding_dim,
        method=method,
    )
