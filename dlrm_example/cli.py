"""Command-line flags to `TrainConfig`, once. Names are torchrec_dlrm's where it has the flag."""

import argparse
from collections.abc import Sequence
from typing import Any

from cce_torchrec import METHODS
from dlrm_example.config import (
    EMBEDDING_OPTIMIZERS,
    INTERACTION_TYPES,
    OPTIMIZER_STATES,
    TrainConfig,
    UsageError,
    default_compression,
    parse_method_options,
)
from dlrm_example.data import DATASETS
from dlrm_example.data.multi_hot import DISTRIBUTIONS
from dlrm_example.preset_files import (
    LIST,
    as_arguments,
    as_preset,
    described_presets,
    preset_names,
    read_preset,
    without_replaced,
)

DEFAULTS = TrainConfig(run_dir="")


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that the flags ask for: a flag's value if it is given, else the preset's, else its default.

    Raises:
        UsageError: for values that are unknown or contradict each other, and for a preset that is unknown or has keys that
            are. (argparse itself exits for malformed flags, and after `--help`, `--preset list` and `--print_config`.)
    """
    parser = _parser()
    unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
    given = {name: value for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    defaults = {name: parser.get_default(name) for name in TrainConfig.__dataclass_fields__}
    if given.get("preset") == LIST:
        print(described_presets())
        parser.exit()
    preset = _preset_flags(parser, given["preset"]) if "preset" in given else {}
    values = _filled({**defaults, **without_replaced(preset, given), **given})
    if "print_config" in given:
        print(as_preset(values), end="")
        parser.exit()
    if not values["run_dir"]:
        parser.error("the following arguments are required: --run_dir")
    return TrainConfig(**values)


def _preset_flags(parser: argparse.ArgumentParser, name: str) -> dict[str, Any]:
    """Read as flags are, so that a preset can say what flags can, and no more."""
    flags = read_preset(name)
    try:
        parsed = vars(parser.parse_args(as_arguments(flags)))
    except SystemExit:
        raise UsageError(f"--preset {name} has a value that no flag can have; see above") from None
    return {key: parsed[key] for key in flags}


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """With the defaults that depend on other flags."""
    values = {name: values[name] for name in TrainConfig.__dataclass_fields__}
    values["method_options"] = parse_method_options(values["method"], values["method_options"])
    if values["compression"] is None:
        otherwise = values["max_params_per_table"] or values["budget_bytes"]
        values["compression"] = 1.0 if otherwise else default_compression(values["method"])
    if values["dense_arch_layer_sizes"] is None:
        values["dense_arch_layer_sizes"] = (64, values["embedding_dim"])
    return values


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 64,32") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


class _Group:
    """A heading of the help. The default of a flag is that of the field of the same name."""

    def __init__(self, group: argparse._ArgumentGroup) -> None:
        self._group = group

    def add(self, name: str, help_text: str, **settings: Any) -> None:
        default = settings.pop("default", getattr(DEFAULTS, name))
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        if default not in (None, "", False):
            help_text += f" (default: {_shown(default)})"
        self._group.add_argument(f"--{name}", help=help_text, default=default, **settings)

    def one_of(self) -> "_Group":
        """Flags that exclude each other."""
        return _Group(self._group.add_mutually_exclusive_group())


def _shown(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlrm_example.train",
        description="Train TorchRec's DLRM with compressed embedding tables.",
        allow_abbrev=False,
    )
    preset_help = (
        f"one of {', '.join(preset_names())}, or a YAML file of flags; {LIST} describes them. Flags win over it"
    )
    parser.add_argument("--preset", help=preset_help)
    parser.add_argument("--print_config", action="store_true", help="print all settings as a preset, and do nothing")
    _add_data_flags(_Group(parser.add_argument_group("data")))
    _add_compression_flags(_Group(parser.add_argument_group("compression")))
    _add_model_flags(_Group(parser.add_argument_group("model")))
    _add_training_flags(_Group(parser.add_argument_group("training")))
    _add_output_flags(_Group(parser.add_argument_group("output")))
    return parser


def _add_data_flags(group: _Group) -> None:
    group.add("dataset_name", f"one of {', '.join(DATASETS)}")
    path_help = "folder of the data's archive; without it, cce_torchrec in the user's cache folder"
    group.add("data_path", f"{path_help}; for parquet, what dlrm_example.data.prepare made")
    discard_help = "throw away each user's last N interactions before splitting: tune with 2, report with 0"
    group.add("discard_last", discard_help, type=int)
    group.add("label_column", "for parquet: the column that must be the label of what was prepared")
    group.add("dense_columns", "for parquet: comma-separated, of those that were prepared (default: all)", type=_names)
    group.add("sparse_columns", "for parquet: comma-separated, of those that were prepared (default: all)", type=_names)
    rows_help = "for parquet: comma-separated, rows of each sparse column's table; ids are taken modulo them"
    group.add("num_embeddings_per_feature", f"{rows_help} (default: as prepared)", type=_sizes)
    sizes_help = "for parquet: comma-separated, ids that each sparse column's one id becomes, as in MLPerf's benchmark"
    group.add("multi_hot_sizes", f"{sizes_help} (default: 1 each)", type=_sizes)
    group.add("multi_hot_distribution_type", f"of the ids that are added: one of {', '.join(DISTRIBUTIONS)}")


def _add_compression_flags(group: _Group) -> None:
    group.add("method", f"one of {', '.join(METHODS)}")
    compression_help = "full parameters / parameters, over all tables together (default: 8; 1 for method full)"
    size = group.one_of()
    size.add("compression", compression_help, type=float, default=None)
    size.add("max_params_per_table", "each table has at most so many parameters, and stays full within them", type=int)
    bytes_help = (
        "plan_compression chooses sizes: tables, optimizer state and re-clustering take so many bytes of a device"
    )
    size.add("budget_bytes", bytes_help, type=int)
    group.add("min_compressed_rows", "for --compression: tables with fewer rows than this stay full", type=int)
    options_help = "fields of the method to fix, such as num_columns=4"
    group.add("method_options", options_help, nargs="+", metavar="KEY=VALUE", default=())
    group.add("recluster_count", "how often tables that can be are re-clustered; 0 for never", type=int)
    group.add("recluster_stop_after", "fraction of training after which no re-clustering happens", type=float)
    state_help = f"of re-clustered rows: one of {', '.join(OPTIMIZER_STATES)}"
    group.add("recluster_optimizer_state", state_help)
    group.add(
        "recluster_gradient_steps", "steps before each re-clustering whose gradients steer it; 0 for none", type=int
    )
    background_help = "steps that are trained while a re-clustering goes on beside them; 0 to stop for it"
    group.add("recluster_background_steps", background_help, type=int)
    group.add("recluster_decode_batch_size", "ids whose vectors a re-clustering holds at a time", type=int)


def _add_model_flags(group: _Group) -> None:
    group.add("embedding_dim", "dims of every embedding", type=int)
    dense_help = "the last is the embedding dim (default: 64,EMBEDDING_DIM)"
    group.add("dense_arch_layer_sizes", dense_help, type=_sizes, default=None)
    group.add("over_arch_layer_sizes", "the last is 1", type=_sizes)
    group.add("interaction_type", f"one of {', '.join(INTERACTION_TYPES)}")
    group.add("dcn_num_layers", "for dcn", type=int)
    group.add("dcn_low_rank_dim", "for dcn", type=int)
    group.add("interaction_branch1_layer_sizes", "for projection", type=_sizes)
    group.add("interaction_branch2_layer_sizes", "for projection", type=_sizes)


def _add_training_flags(group: _Group) -> None:
    group.add("learning_rate", "of embeddings and dense layers", type=float)
    group.add("eps", "of Adagrad", type=float)
    group.add("adagrad", "dense layers by Adagrad instead of SGD")
    group.add("embedding_optimizer", f"of codebooks and tables: one of {', '.join(EMBEDDING_OPTIMIZERS)}")
    group.add("lr_warmup_steps", "the learning rate rises from 0 in a line over so many steps; 0 for none", type=int)
    group.add("lr_decay_start", "the step from which the learning rate falls", type=int)
    group.add("lr_decay_steps", "it falls to 0 by a square over so many steps; 0 for never", type=int)
    group.add("epochs", "passes over the training rows", type=int)
    batch = group.one_of()
    batch.add("batch_size", "rows a step and rank", type=int)
    batch.add("global_batch_size", "rows a step over all ranks: stays right when their number changes", type=int)
    group.add("test_batch_size", "rows a batch and rank when evaluating", type=int)
    for split in ("train", "val", "test"):
        group.add(f"limit_{split}_batches", f"use at most this many {split} batches (an epoch)", type=int)
    group.add("validation_freq_within_epoch", "evaluate every N steps too, not only after each epoch", type=int)
    group.add("validation_auroc", "stop at the first evaluation with at least this validation AUROC", type=float)
    epoch_end_help = "evaluate after each epoch, not only after the last and every VALIDATION_FREQ_WITHIN_EPOCH steps"
    group.add("evaluate_on_epoch_end", epoch_end_help)
    training_end_help = "score the test split once, when training ends, not whenever validation is the best so far"
    group.add("evaluate_on_training_end", training_end_help)
    group.add("seed", "of weights, hashes, shuffling and re-clustering", type=int)
    timeout_help = "seconds after which a rank gives up waiting for the others"
    group.add("collective_timeout", timeout_help, type=float)
    group.add("num_threads", "CPU threads of torch; so small a model gains nothing from more", type=int)


def _add_output_flags(group: _Group) -> None:
    group.add("run_dir", "where config.json, metrics.jsonl, summary.json and checkpoints/ go")
    group.add("overwrite", "replace the run in run_dir")
    checkpoint_help = (
        "save a checkpoint every N epochs and after the last, and keep the last two and the best; 0 for none"
    )
    group.add("checkpoint_every_epochs", checkpoint_help, type=int)
    steps_help = "save a checkpoint every N steps too, also within an epoch"
    group.add("checkpoint_every_steps", steps_help, type=int)
    best_help = "where checkpoints are saved at all, save one whenever validation BCE is the best so far, too"
    group.add("checkpoint_best", best_help)
    resume_help = (
        "continue from the last complete checkpoint in run_dir, on any number of ranks with the same rows a step"
    )
    group.add("resume", f"{resume_help}; where there is none, start afresh")
    group.add("log_every_steps", "one line of speed and scores every N steps", type=int)
    board_help = "write scores for TensorBoard into run_dir/tensorboard; needs the package tensorboard"
    group.add("tensorboard", board_help)
    group.add("print_sharding_plan", "print the planner's choice")
    group.add("print_progress", "progress bars on a terminal")
