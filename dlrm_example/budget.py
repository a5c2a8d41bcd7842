"""Choose a method config for every table: by a share of the parameters, by a cap of each table, or by bytes of a device."""

import logging

import torch

from cce_torchrec import METHODS, CompressedEmbeddingBagConfig, plan_compression
from cce_torchrec.methods import DecodeMethod, FullTable, MethodConfig
from dlrm_example.config import OptionValue, TrainConfig, UsageError, recluster_config
from dlrm_example.data import DatasetInfo, SparseFeature

logger = logging.getLogger(__name__)


def plan_tables(info: DatasetInfo, config: TrainConfig) -> list[CompressedEmbeddingBagConfig]:
    """One table a feature, within `--compression`, `--max_params_per_table` or `--budget_bytes`, whichever is given.

    Raises:
        UsageError: the budget is too small; it names one that works.
    """
    if config.max_params_per_table is not None:
        methods = _capped(info, config, config.max_params_per_table)
    elif config.budget_bytes is not None:
        methods = _of_bytes(info, config, config.budget_bytes)
    else:
        methods = _compressed(info, config)
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


def _capped(info: DatasetInfo, config: TrainConfig, cap: int) -> dict[str, MethodConfig]:
    """Tables that are no larger than the cap stay full; each other one is of the size of the cap."""
    methods: dict[str, MethodConfig] = {}
    for feature in info.sparse_features:
        fits = feature.num_embeddings * config.embedding_dim <= cap
        try:
            methods[feature.name] = FullTable() if fits else _fit(feature, cap, config)
        except ValueError as error:
            raise UsageError(f"--max_params_per_table {cap} with --method {config.method}: {error}") from None
    return methods


def _of_bytes(info: DatasetInfo, config: TrainConfig, budget_bytes: int) -> dict[str, MethodConfig]:
    """What :func:`cce_torchrec.plan_compression` chooses; tables of the data's most frequent lookups get the most."""
    full = [_table(feature, FullTable(), config.embedding_dim) for feature in info.sparse_features]
    counts = None if info.count_lookups is None else info.count_lookups()
    try:
        plan = plan_compression(
            full,
            budget_bytes=budget_bytes,
            statistics=None if counts is None else {f"t_{name}": counts[name] for name in counts},
            methods={config.method: _overrides(config)},
            optimizer=config.embedding_optimizer,
            recluster=recluster_config(config),
            device_type="cuda" if torch.cuda.is_available() else "cpu",
        )
    except ValueError as error:
        raise UsageError(f"--budget_bytes {budget_bytes}: {error}") from None
    logger.info("%s", plan)
    return {feature.name: plan.methods[f"t_{feature.name}"] for feature in info.sparse_features}


def _compressed(info: DatasetInfo, config: TrainConfig) -> dict[str, MethodConfig]:
    """Tables with few rows stay full; the others share what is left, in proportion to their rows."""
    try:
        return _methods(info, config, config.compression)
    except ValueError as error:
        largest = _largest_compression(info, config)
        remedy = f"at most {largest:.4g} works here" if largest else "no compression works with these options"
        flags = f"--compression {config.compression:g} with --method {config.method}"
        raise UsageError(f"{flags}: {error} ({remedy})") from None


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
    """The largest instance of the method within the budget."""
    try:
        return METHODS[config.method].from_budget(
            feature.num_embeddings, config.embedding_dim, budget, **_overrides(config)
        )
    except ValueError as error:
        raise ValueError(f"table {feature.name!r}, whose share is {budget} parameters: {error}") from None


def _overrides(config: TrainConfig) -> dict[str, OptionValue]:
    """The fields of the method that are given; where it hashes, seeded by the run's seed."""
    seed = {"seed": config.seed} if "seed" in METHODS[config.method].__dataclass_fields__ else {}
    return {**seed, **config.method_options}


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
