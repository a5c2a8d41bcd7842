"""Presets: each trains on generated data, made small by flags alone; flags win; what a file may not have is named."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlrm_example.cli import parse_config
from dlrm_example.config import UsageError
from dlrm_example.data import generate, prepare
from dlrm_example.data.prepare_config import parse_prepare_config
from dlrm_example.preset_files import SHIPPED, preset_names
from dlrm_example.records import read_json, read_summary
from dlrm_example.train import main

SMALL = "--limit_train_batches 2 --limit_val_batches 1 --limit_test_batches 1 --epochs 1 --recluster_count 1"
SMALL += " --global_batch_size 64 --test_batch_size 512 --checkpoint_every_epochs 0 --no-print_progress"
SIZES = ",".join(str(4 + 3 * column) for column in range(26))
SMALLER = {  # what else a preset needs to be small
    "criteo_1t_mlperf_v2": f"--num_embeddings_per_feature {SIZES} --dcn_low_rank_dim 8 --over_arch_layer_sizes 16,1",
    "criteo_kaggle_paper": "--max_params_per_table 512",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating ShardedTensor:FutureWarning"),
]


def content(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()))


def settings(flags: str) -> dict[str, Any]:
    return dataclasses.asdict(parse_config(["--run_dir", "x", "--data_path", "d", *flags.split()]))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("presets")
    flags = ["--rows", "1200", "--days", "3", "--num_ids", "60", "--clusters", "8"]
    assert generate.main(["--out", str(root / "logs"), *flags]) == 0
    logs, prepared = str(root / "logs" / "day_*"), str(root / "prepared")
    assert prepare.main(["--format", "criteo_1t", "--input", logs, "--out", prepared]) == 0
    return root / "prepared"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_trains(name: str, generated: Path, tmp_path: Path, data_path: str) -> None:
    data = data_path if content(name)["dataset_name"] == "movielens_100k" else str(generated)
    small = [*SMALL.split(), *SMALLER.get(name, "").split()]
    assert main(["--preset", name, "--data_path", data, "--run_dir", str(tmp_path), *small]) == 0
    assert read_summary(tmp_path).steps == 2
    used, given = read_json(tmp_path / "config.json"), {flag.removeprefix("--") for flag in small}
    for key, value in content(name).items():
        if key not in ("about", *given):
            assert used[key] == value, key


def test_the_papers_cap_is_kept_by_every_table(generated: Path, tmp_path: Path) -> None:
    flags = ["--preset", "criteo_kaggle_paper", *SMALL.split(), *SMALLER["criteo_kaggle_paper"].split()]
    assert main([*flags, "--data_path", str(generated), "--run_dir", str(tmp_path)]) == 0
    columns = read_json(generated / "manifest.json")["sparse"]
    fitting = [min(column["num_embeddings"] * 16, 512) for column in columns]
    assert max(column["num_embeddings"] * 16 for column in columns) > 512
    assert 0.9 * sum(fitting) < read_summary(tmp_path).embedding_params <= sum(fitting)


def test_what_the_published_settings_are() -> None:
    paper, v2 = content("criteo_kaggle_paper"), content("criteo_1t_mlperf_v2")
    published = {"embedding_dim": 16, "learning_rate": 0.1, "global_batch_size": 128, "epochs": 10}
    assert {key: paper[key] for key in published} == published
    assert (paper["adagrad"], paper["embedding_optimizer"]) == (False, "sgd")
    published = {"embedding_dim": 128, "learning_rate": 0.005, "global_batch_size": 65536, "validation_auroc": 0.80275}
    published |= {"interaction_type": "dcn", "dcn_num_layers": 3, "dcn_low_rank_dim": 512, "adagrad": True}
    assert {key: v2[key] for key in published} == published
    assert len(v2["num_embeddings_per_feature"]) == len(v2["multi_hot_sizes"]) == 26
    assert (sum(v2["num_embeddings_per_feature"]), sum(v2["multi_hot_sizes"])) == (204_184_588, 214)


def test_flags_win_over_the_preset_and_the_preset_over_defaults() -> None:
    preset = settings("--preset criteo_kaggle_dlrm")
    assert (preset["learning_rate"], preset["global_batch_size"], preset["seed"]) == (0.1, 128, 1)
    changed = settings("--learning_rate 0.05 --preset criteo_kaggle_dlrm --adagrad --over_arch_layer_sizes 8,1")
    assert {key: changed[key] for key in changed if changed[key] != preset[key]} == {
        "learning_rate": 0.05,  # the default of the flag, yet given
        "adagrad": True,
        "over_arch_layer_sizes": (8, 1),
    }
    assert settings("--preset criteo_1t_mlperf_v2 --no-adagrad")["adagrad"] is False


def test_a_flag_replaces_what_it_excludes() -> None:
    batch = settings("--preset criteo_kaggle_paper --batch_size 32")
    assert (batch["batch_size"], batch["global_batch_size"]) == (32, None)
    smaller = settings("--preset criteo_kaggle_paper --compression 100")
    assert (smaller["compression"], smaller["max_params_per_table"]) == (100.0, None)
    assert smaller["method_options"] == {"num_columns": 4}
    robe = settings("--preset criteo_kaggle_paper --method robe")
    assert (robe["method"], robe["method_options"], robe["max_params_per_table"]) == ("robe", {}, 8192)
    full = settings("--preset criteo_kaggle_paper --method full")
    assert (full["compression"], full["max_params_per_table"]) == (1.0, None)


@pytest.mark.parametrize("name", preset_names())
def test_what_print_config_prints_is_the_same_preset(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--seed 7 --no-print_progress"
    with pytest.raises(SystemExit) as caught:
        parse_config(["--preset", name, "--print_config", *flags.split()])
    assert not caught.value.code
    (tmp_path / "own.yaml").write_text(capsys.readouterr().out)
    assert settings(f"--preset {tmp_path / 'own.yaml'}") == settings(f"--preset {name} {flags}")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "method: cce\nmethod_options: {num_columns: 2, seed: 5}\nsparse_columns: [u, i]\n"
    )
    own = settings(f"--preset {tmp_path / 'own.yaml'} --dataset_name parquet")
    assert (own["method"], own["compression"], own["sparse_columns"]) == ("cce", 8.0, ("u", "i"))
    assert own["method_options"] == {"num_columns": 2, "seed": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embeding_dim: 16", "embeding_dim is no flag of dlrm_example.train"),
        ("preset: criteo_kaggle_paper", "preset is no flag"),
        ("run_dir: runs/x", "run_dir is of one run"),
        ("epochs: many", "own.yaml has a value that no flag can have"),
        ("batch_size: 2\nglobal_batch_size: 4", "own.yaml has a value that no flag can have"),
        ("epochs", "must have lines such as"),
        ("epochs: [", "is no YAML"),
        ("epochs: 0", "--epochs is 0"),
    ],
)
def test_what_a_file_may_not_have(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parse_config(["--run_dir", "x", "--preset", str(tmp_path / "own.yaml")])


def test_unknown_presets_are_errors_that_list_the_known() -> None:
    with pytest.raises(UsageError, match=r"'criteo' is unknown; .* criteo_1t_mlperf_v1, criteo_1t_mlperf_v2, "):
        parse_config(["--run_dir", "x", "--preset", "criteo"])


def test_presets_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--preset", "list"])
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(line.endswith(content(line.split()[0])["about"]) for line in lines)


@pytest.mark.parametrize("name", preset_names())
def test_commands_in_comments_are_commands(name: str) -> None:
    commands = re.findall(r"^# python -m (.*)$", (SHIPPED / f"{name}.yaml").read_text(), re.MULTILINE)
    assert commands or name == "movielens_100k"
    for command in commands:
        module, *flags = shlex.split(command)
        if module == "dlrm_example.data.prepare":
            assert parse_prepare_config(flags).format.startswith("criteo")
        else:
            assert module == "dlrm_example.data.generate"
            generate._parser().parse_args(flags)
