"""Every setting of a training run in one frozen `TrainConfig`, and the rules its values must keep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

from cce_torchrec import METHODS, ReclusterConfig, ReclusterSchedule
from dlrm_example.data import DATASETS
from dlrm_example.data.multi_hot import DISTRIBUTIONS
from dlrm_example.errors import UsageError

INTERACTION_TYPES = ("original", "dcn", "projection")
OPTIMIZER_STATES = ("reset", "carry")
EMBEDDING_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")

OptionValue = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train on what; `cli.py` says what each field means, in the help of the flag of the same name."""

    run_dir: str
    dataset_name: str = "movielens_100k"
    data_path: str | None = None
    discard_last: int = 0
    label_column: str | None = None
    dense_columns: tuple[str, ...] | None = None
    sparse_columns: tuple[str, ...] | None = None
    num_embeddings_per_feature: tuple[int, ...] | None = None
    multi_hot_sizes: tuple[int, ...] | None = None
    multi_hot_distribution_type: Literal["uniform", "pareto"] = "uniform"

    method: str = "full"
    compression: float = 1.0
    max_params_per_table: int | None = None
    budget_bytes: int | None = None
    min_compressed_rows: int = 100
    method_options: Mapping[str, OptionValue] = field(default_factory=dict)
    recluster_count: int = 6
    recluster_stop_after: float = 0.8
    recluster_optimizer_state: Literal["reset", "carry"] = ReclusterConfig.optimizer_state
    recluster_gradient_steps: int = ReclusterSchedule.gradient_steps
    recluster_background_steps: int = ReclusterSchedule.background_steps
    recluster_decode_batch_size: int = ReclusterConfig.decode_batch_size

    embedding_dim: int = 32
    dense_arch_layer_sizes: tuple[int, ...] = (64, 32)
    over_arch_layer_sizes: tuple[int, ...] = (128, 64, 1)
    interaction_type: str = "original"
    dcn_num_layers: int = 3
    dcn_low_rank_dim: int = 64
    interaction_branch1_layer_sizes: tuple[int, ...] = (128, 64)
    interaction_branch2_layer_sizes: tuple[int, ...] = (128, 64)

    learning_rate: float = 0.05
    eps: float = 1e-8
    adagrad: bool = False
    embedding_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr_warmup_steps: int = 0
    lr_decay_start: int = 0
    lr_decay_steps: int = 0
    epochs: int = 10
    batch_size: int = 1024
    global_batch_size: int | None = None
    test_batch_size: int = 4096
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    limit_test_batches: int | None = None
    validation_freq_within_epoch: int | None = None
    validation_auroc: float | None = None
    evaluate_on_epoch_end: bool = True
    evaluate_on_training_end: bool = False
    seed: int = 1

    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_best: bool = True
    resume: bool = False
    collective_timeout: float = 600.0
    num_threads: int = 1
    log_every_steps: int = 100
    tensorboard: bool = False
    print_sharding_plan: bool = False
    print_progress: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the first flag whose value cannot be."""
        _check_choice("dataset_name", self.dataset_name, DATASETS)
        _check_choice("method", self.method, METHODS)
        _check_choice("recluster_optimizer_state", self.recluster_optimizer_state, OPTIMIZER_STATES)
        _check_choice("interaction_type", self.interaction_type, INTERACTION_TYPES)
        _check_choice("multi_hot_distribution_type", self.multi_hot_distribution_type, DISTRIBUTIONS)
        _check_choice("embedding_optimizer", self.embedding_optimizer, EMBEDDING_OPTIMIZERS)
        _check_data(self)
        _check_numbers(self)
        _check_schedule(self)
        _check_compression(self)
        _check_layers(self)
        if self.resume and self.overwrite:
            raise UsageError("--resume continues what --overwrite would replace; give one of them")


def recluster_config(config: TrainConfig) -> ReclusterConfig:
    """How a training re-clusters, and what memory for it a budget counts."""
    return ReclusterConfig(
        optimizer_state=config.recluster_optimizer_state, decode_batch_size=config.recluster_decode_batch_size
    )


def default_compression(method: str) -> float:
    """What `--compression` is where it is not given."""
    return 1.0 if method == "full" else 8.0


def divide_global_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """The config with the `batch_size` that `global_batch_size` comes to on so many ranks.

    Raises:
        UsageError: it cannot be divided evenly.
    """
    rows = config.global_batch_size
    if rows is None:
        return config
    if rows % world_size:
        nearest = max(round(rows / world_size), 1) * world_size
        raise UsageError(f"--global_batch_size {rows} cannot be divided by {world_size} ranks; {nearest} can")
    return replace(config, batch_size=rows // world_size)


def parse_method_options(method: str, pairs: Sequence[str]) -> dict[str, OptionValue]:
    """`["num_columns=4"]` as `{"num_columns": 4}`, by the types of the method's fields.

    Raises:
        UsageError: no `=`, no such field, or a value that is not of the field's type.
    """
    _check_choice("method", method, METHODS)
    types = get_type_hints(METHODS[method])
    known = {field.name: types[field.name] for field in fields(METHODS[method])}
    options: dict[str, OptionValue] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--method_options {pair!r} is not key=value")
        if name not in known:
            raise UsageError(f"--method_options {name}: method {method} has no such field; it has {_listed(known)}")
        options[name] = _typed(name, text, known[name])
    return options


def _typed(name: str, text: str, wanted: object) -> OptionValue:
    """`text` as the first of int, float, bool and str that the field's type allows and that reads it."""
    allowed = get_args(wanted) or (wanted,)
    if bool in allowed and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in allowed:
            try:
                return number(text)
            except ValueError:
                continue
    if str in allowed or text in allowed:
        return text
    told = _listed(allowed) if get_origin(wanted) is Literal else getattr(wanted, "__name__", wanted)
    raise UsageError(f"--method_options {name}={text!r}: expected {told}")


def _check_choice(name: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"--{name} {value!r} is unknown; there are {_listed(known)}")


def _listed(names: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


_POSITIVE = (
    *("embedding_dim", "dcn_num_layers", "dcn_low_rank_dim", "min_compressed_rows", "learning_rate", "eps", "epochs"),
    *("batch_size", "test_batch_size", "num_threads", "validation_freq_within_epoch", "collective_timeout"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "log_every_steps"),
    *("global_batch_size", "checkpoint_every_steps", "max_params_per_table", "budget_bytes"),
    "recluster_decode_batch_size",
)


_SIZES = ("num_embeddings_per_feature", "multi_hot_sizes")


def _check_data(config: TrainConfig) -> None:
    if config.dataset_name == "parquet":
        if config.data_path is None:
            raise UsageError("--dataset_name parquet needs --data_path, a folder that dlrm_example.data.prepare made")
        if config.discard_last:
            raise UsageError(
                "--discard_last is for movielens_100k; how parquet is split is up to dlrm_example.data.prepare"
            )
        for name in _SIZES:
            sizes = getattr(config, name)
            if sizes is not None and min(sizes) < 1:
                raise UsageError(f"--{name} {_joined(sizes)} must be numbers above 0")
        return
    for name in ("label_column", "dense_columns", "sparse_columns", *_SIZES):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name} is for --dataset_name parquet; {config.dataset_name} has columns of its own")


def _check_numbers(config: TrainConfig) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name} is {value}; it must be above 0")
    for name in (
        *("recluster_count", "recluster_gradient_steps", "recluster_background_steps", "checkpoint_every_epochs"),
        *("discard_last", "seed", "lr_warmup_steps", "lr_decay_start", "lr_decay_steps"),
    ):
        if getattr(config, name) < 0:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be 0 or more")
    if config.embedding_dim % 4:
        raise UsageError(f"--embedding_dim is {config.embedding_dim}; FBGEMM's kernels need a multiple of 4")
    if config.seed >= 2**63:
        raise UsageError(f"--seed is {config.seed}; it must be below 2^63")
    if not 0 < config.recluster_stop_after <= 1:
        raise UsageError(f"--recluster_stop_after is {config.recluster_stop_after}; it is a fraction of training")


def _check_schedule(config: TrainConfig) -> None:
    if config.lr_decay_steps and config.lr_decay_start < config.lr_warmup_steps:
        raise UsageError(
            f"--lr_decay_start {config.lr_decay_start} is before the warm-up ends, --lr_warmup_steps "
            f"{config.lr_warmup_steps}; the learning rate rises first, then falls"
        )
    if config.validation_auroc is not None and not 0.5 < config.validation_auroc <= 1:
        raise UsageError(f"--validation_auroc is {config.validation_auroc}; it must be above 0.5 and at most 1")


def _check_compression(config: TrainConfig) -> None:
    if not (config.compression >= 1 and math.isfinite(config.compression)):
        raise UsageError(f"--compression is {config.compression}; it must be 1 or more")
    sizes = {"compression": config.compression if config.compression != 1 else None}
    sizes |= {"max_params_per_table": config.max_params_per_table, "budget_bytes": config.budget_bytes}
    given = [f"--{name} {value:g}" for name, value in sizes.items() if value is not None]
    if config.method == "full" and given:
        raise UsageError(f"--method full cannot have {given[0]}; choose another method")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different ways to size the tables; give one")


def _check_layers(config: TrainConfig) -> None:
    sizes = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__ if name.endswith("_layer_sizes")}
    for name, layers in sizes.items():
        if not layers or min(layers) < 1:
            raise UsageError(f"--{name} is {_joined(layers)}; it needs one or more sizes above 0")
    if config.dense_arch_layer_sizes[-1] != config.embedding_dim:
        raise UsageError(
            f"--dense_arch_layer_sizes {_joined(config.dense_arch_layer_sizes)} must end with "
            f"--embedding_dim {config.embedding_dim}: the dense features become one more embedding"
        )
    if config.over_arch_layer_sizes[-1] != 1:
        raise UsageError(f"--over_arch_layer_sizes {_joined(config.over_arch_layer_sizes)} must end with 1, the logit")
    for name in ("interaction_branch1_layer_sizes", "interaction_branch2_layer_sizes"):
        if config.interaction_type == "projection" and sizes[name][-1] % config.embedding_dim:
            raise UsageError(
                f"--{name} {_joined(sizes[name])} must end with a multiple of --embedding_dim {config.embedding_dim}"
            )


def _joined(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
