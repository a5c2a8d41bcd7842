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
    default_compression,
    parse_method_options,
)
from dlrm_example.data import DATASETS
from dlrm_example.data.multi_hot import DISTRIBUTIONS

DEFAULTS = TrainConfig(run_dir="")


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that the flags ask for.

    Raises:
        UsageError: for values that are unknown or contradict each other. (argparse itself exits for malformed flags.)
    """
    values = vars(_parser().parse_args(argv))
    values["method_options"] = parse_method_options(values["method"], values["method_options"])
    if values["compression"] is None:
        values["compression"] = default_compression(values["method"])
    if values["dense_arch_layer_sizes"] is None:
        values["dense_arch_layer_sizes"] = (64, values["embedding_dim"])
    return TrainConfig(**values)


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
    group.add("compression", compression_help, type=float, default=None)
    group.add("min_compressed_rows", "tables with fewer rows than this stay full", type=int)
    options_help = "fields of the method to fix, such as num_columns=4"
    group.add("method_options", options_help, nargs="+", metavar="KEY=VALUE", default=())
    group.add("recluster_count", "how often tables that can be are re-clustered; 0 for never", type=int)
    group.add("recluster_stop_after", "fraction of training after which no re-clustering happens", type=float)
    state_help = f"of re-clustered rows: one of {', '.join(OPTIMIZER_STATES)}"
    group.add("recluster_optimizer_state", state_help)


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
    group.add("adagrad", "dense layers by Adagrad instead of SGD", action="store_true")
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
    group.add("evaluate_on_epoch_end", epoch_end_help, action=argparse.BooleanOptionalAction)
    training_end_help = "score the test split once, when training ends, not whenever validation is the best so far"
    group.add("evaluate_on_training_end", training_end_help, action="store_true")
    group.add("seed", "of weights, hashes, shuffling and re-clustering", type=int)
    timeout_help = "seconds after which a rank gives up waiting for the others"
    group.add("collective_timeout", timeout_help, type=float)
    group.add("num_threads", "CPU threads of torch; so small a model gains nothing from more", type=int)


def _add_output_flags(group: _Group) -> None:
    group.add("run_dir", "where config.json, metrics.jsonl, summary.json and checkpoints/ go", required=True)
    group.add("overwrite", "replace the run in run_dir", action="store_true")
    checkpoint_help = (
        "save a checkpoint every N epochs and after the last, and keep the last two and the best; 0 for none"
    )
    group.add("checkpoint_every_epochs", checkpoint_help, type=int)
    steps_help = "save a checkpoint every N steps too, also within an epoch"
    group.add("checkpoint_every_steps", steps_help, type=int)
    best_help = "where checkpoints are saved at all, save one whenever validation BCE is the best so far, too"
    group.add("checkpoint_best", best_help, action=argparse.BooleanOptionalAction)
    resume_help = (
        "continue from the last complete checkpoint in run_dir, on any number of ranks with the same rows a step"
    )
    group.add("resume", f"{resume_help}; where there is none, start afresh", action="store_true")
    group.add("log_every_steps", "one line of speed and scores every N steps", type=int)
    board_help = "write scores for TensorBoard into run_dir/tensorboard; needs the package tensorboard"
    group.add("tensorboard", board_help, action="store_true")
    group.add("print_sharding_plan", "print the planner's choice", action="store_true")
    group.add("print_progress", "progress bars on a terminal", action=argparse.BooleanOptionalAction)
