"""Flags to config, and what is said of flags that cannot be."""

from pathlib import Path

import pytest

from cce_torchrec import METHODS
from dlrm_example import cli
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.train import main


def test_defaults_of_flags_are_those_of_the_config() -> None:
    assert cli.parse_config(["--run_dir", "x"]) == TrainConfig(run_dir="x")


def test_every_field_has_a_flag() -> None:
    flags = {action.dest for action in cli._parser()._actions} - {"help", "preset", "print_config"}
    assert flags == set(TrainConfig.__dataclass_fields__)


def test_flags_reach_the_config() -> None:
    flags = "--run_dir x --method cce --compression 16 --method_options num_columns=4 seed=7 --embedding_dim 16"
    flags += " --over_arch_layer_sizes 8,1 --adagrad --limit_val_batches 3 --no-print_progress"
    config = cli.parse_config(flags.split())
    assert (config.method, config.compression, config.embedding_dim) == ("cce", 16.0, 16)
    assert config.method_options == {"num_columns": 4, "seed": 7}
    assert (config.dense_arch_layer_sizes, config.over_arch_layer_sizes) == ((64, 16), (8, 1))
    assert (config.adagrad, config.limit_val_batches, config.print_progress) == (True, 3, False)


@pytest.mark.parametrize(("method", "compression"), [("full", 1.0), ("hashing_trick", 8.0), ("cce", 8.0)])
def test_default_compression(method: str, compression: float) -> None:
    assert cli.parse_config(["--run_dir", "x", "--method", method]).compression == compression


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method no_such_method", "--method 'no_such_method' is unknown; there are full, hashing_trick"),
        ("--dataset_name criteo", "--dataset_name 'criteo' is unknown; there are movielens_100k"),
        ("--dataset_name parquet --data_path runs/nowhere --discard_last 1", "--discard_last is for movielens_100k"),
        ("--label_column y", "--label_column is for --dataset_name parquet"),
        ("--sparse_columns u,i", "--sparse_columns is for --dataset_name parquet"),
        ("--interaction_type cross", "there are original, dcn, projection"),
        ("--compression 8", "--method full cannot have --compression 8"),
        ("--method cce --compression 0.5", "--compression is 0.5; it must be 1 or more"),
        ("--method cce --compression nan", "--compression is nan"),
        ("--embedding_dim 0", "--embedding_dim is 0; it must be above 0"),
        ("--epochs -1", "--epochs is -1; it must be above 0"),
        ("--learning_rate inf", "--learning_rate is inf"),
        ("--limit_val_batches 0", "--limit_val_batches is 0"),
        ("--seed -1", "--seed is -1; it must be 0 or more"),
        ("--checkpoint_every_epochs -1", "--checkpoint_every_epochs is -1; it must be 0 or more"),
        ("--collective_timeout 0", "--collective_timeout is 0.0; it must be above 0"),
        ("--resume --overwrite", "--resume continues what --overwrite would replace"),
        ("--embedding_optimizer adam", "there are rowwise_adagrad, adagrad, sgd"),
        ("--lr_decay_steps -1", "--lr_decay_steps is -1; it must be 0 or more"),
        (
            "--lr_warmup_steps 9 --lr_decay_start 8 --lr_decay_steps 1",
            "8 is before the warm-up ends, --lr_warmup_steps 9",
        ),
        ("--validation_auroc 80.275", "--validation_auroc is 80.275; it must be above 0.5 and at most 1"),
        ("--recluster_stop_after 1.5", "--recluster_stop_after is 1.5"),
        ("--dense_arch_layer_sizes 64,31", "64,31 must end with --embedding_dim 32"),
        ("--over_arch_layer_sizes 64", "must end with 1"),
        ("--over_arch_layer_sizes 0,1", "sizes above 0"),
        ("--interaction_type projection --interaction_branch1_layer_sizes 33", "a multiple of --embedding_dim 32"),
        ("--method cce --method_options num_columns", "'num_columns' is not key=value"),
        ("--method cce --method_options columns=4", "method cce has no such field; it has num_rows, num_columns"),
        ("--method cce --method_options num_columns=four", "num_columns='four': expected int"),
        ("--method cce --method_options initial_assignments=x", "initial_assignments='x': expected blocks, hash"),
        ("--method cce --method_options num_columns=5", "num_columns=5"),
        ("--method cce --compression 100000", r"works here"),
        ("--method cce --min_compressed_rows 5000", "so none is compressed"),
    ],
)
def test_bad_flags_end_with_a_message_and_code_2(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], data_path: str
) -> None:
    assert main(["--run_dir", str(tmp_path / "run"), "--data_path", data_path, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_parquet_needs_a_path_and_knows_its_columns() -> None:
    with pytest.raises(UsageError, match="--dataset_name parquet needs --data_path"):
        cli.parse_config(["--run_dir", "x", "--dataset_name", "parquet"])
    flags = "--run_dir x --dataset_name parquet --data_path d --label_column y --dense_columns a,b --sparse_columns u"
    config = cli.parse_config(flags.split())
    assert (config.label_column, config.dense_columns, config.sparse_columns) == ("y", ("a", "b"), ("u",))


def test_malformed_flags_are_argparse_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--epochs", "many"], ["--over_arch_layer_sizes", "8,one"], ["--no_such_flag"], ["--epo", "3"]):
        with pytest.raises(SystemExit) as caught:
            cli.parse_config(["--run_dir", "x", *flags])
        assert caught.value.code == 2
    assert "is not a list of sizes such as 64,32" in capsys.readouterr().err


def test_help_shows_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse_config(["--help"])
    shown = capsys.readouterr().out
    assert all(method in shown for method in METHODS)


def test_types_of_method_options() -> None:
    typed = cli.parse_config(["--run_dir", "x", "--method", "cce", "--method_options", "num_helper_rows=3"])
    assert typed.method_options == {"num_helper_rows": 3}
