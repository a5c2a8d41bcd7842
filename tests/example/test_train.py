"""Whole runs, small: the files they leave, their scores against plain loops, and seeds that mean something."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cce_torchrec import METHODS
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.data import DATASETS
from dlrm_example.data.movielens_archive import SOURCES
from dlrm_example.divergence import TrainingDivergedError
from dlrm_example.metrics import evaluate
from dlrm_example.records import Summary, read_metrics
from dlrm_example.train import main, train

Configs = Callable[..., TrainConfig]
TIMES = {"train_seconds", "recluster_seconds"}

pytestmark = pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning")


def without_times(summary: Summary) -> dict[str, object]:
    return {name: value for name, value in vars(summary).items() if name not in TIMES}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_its_files(method: str, small_config: Configs) -> None:
    compression = 1.0 if method == "full" else 4.0
    config = small_config(method=method, compression=compression, recluster_count=2)
    summary = train(config)
    folder = Path(config.run_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.jsonl", "summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == vars(summary)
    assert json.loads((folder / "config.json").read_text())["method"] == method
    assert summary.full_embedding_params == 3541 * 8
    assert summary.compression_params == pytest.approx(summary.full_embedding_params / summary.embedding_params)
    assert compression <= summary.compression_params < compression * 1.3
    assert summary.compression_bytes <= summary.compression_params
    assert (summary.steps, summary.world_size, summary.seed) == (12, 1, 5)


def test_summary_is_the_best_of_the_metrics(small_config: Configs) -> None:
    config = small_config(validation_freq_within_epoch=2, epochs=3)
    summary = train(config)
    rows = [row for row in read_metrics(Path(config.run_dir)) if row["event"] == "eval"]
    val = [row for row in rows if row["split"] == "val"]
    assert [row["step"] for row in val] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    best = min(val, key=lambda row: row["bce"])
    assert (summary.best_val_bce, summary.best_step, summary.best_epoch) == (best["bce"], best["step"], best["epoch"])
    assert summary.best_val_auroc == max(row["auroc"] for row in val)
    (test,) = [row for row in rows if row["split"] == "test" and row["step"] == best["step"]]
    assert (summary.test_bce, summary.test_auroc) == (test["bce"], test["auroc"])


class FixedLogits(torch.nn.Module):
    """Scores that depend on a batch's rows only: a stand-in for a model."""

    def forward(self, batch):  # type: ignore[no-untyped-def]
        logits = batch.dense_features.sum(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        return loss, (loss, logits, batch.labels)


def test_scores_against_their_definitions(small_config: Configs) -> None:
    """BCE as a mean over rows, AUROC as the part of (positive, negative) pairs in the right order."""
    dataset = DATASETS["movielens_100k"](small_config().data_path)
    loader = dataset.loader("val", batch_size=100)  # 943 rows: batches of unequal size
    scores = evaluate(FixedLogits(), loader, torch.device("cpu"), title="val", progress=False)
    batches = list(loader.epoch(0))
    logits = torch.cat([batch.dense_features.double().sum(1) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    probabilities = torch.where(labels == 1, 1 / (1 + torch.exp(-logits)), 1 / (1 + torch.exp(logits)))
    assert scores.bce == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)
    positive, negative = logits[labels == 1][:, None], logits[labels == 0][None, :]
    pairs = (positive > negative).double() + 0.5 * (positive == negative).double()
    assert scores.auroc == pytest.approx(pairs.mean().item(), abs=1e-6)


@pytest.mark.parametrize("method", ["full", "cce"])
def test_same_seed_same_run(method: str, small_config: Configs) -> None:
    changes = {"method": method, "compression": 1.0 if method == "full" else 4.0, "recluster_count": 2}
    changes |= {"validation_freq_within_epoch": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    seeds = {"one": 5, "same": 5, "other": 6}
    one, same, _ = (train(small_config(name, **changes, seed=seed)) for name, seed in seeds.items())

    def losses(name: str) -> list[float]:
        """Of every step, since there is an evaluation after each."""
        rows = read_metrics(Path(small_config(name).run_dir))
        return [row["bce"] for row in rows if row.get("split") == "train"]

    assert without_times(one) == without_times(same)
    assert losses("one") == losses("same"), "bit by bit"
    assert len(losses("one")) == 12
    assert not set(losses("one")) & set(losses("other"))


def test_evaluating_more_often_does_not_change_the_training(small_config: Configs) -> None:
    last = {}
    for name, every in (("rarely", None), ("often", 1)):
        config = small_config(name, method="cce", compression=4.0, validation_freq_within_epoch=every)
        train(config)
        rows = read_metrics(Path(config.run_dir))
        last[name] = [row["bce"] for row in rows if row["event"] == "eval" and row["split"] == "val"][-1]
    assert last["rarely"] == last["often"]


def test_reclusterings_are_recorded(small_config: Configs) -> None:
    config = small_config(method="cce", compression=4.0, recluster_count=3, limit_train_batches=10)
    summary = train(config)
    rows = [row for row in read_metrics(Path(config.run_dir)) if row["event"] == "recluster"]
    assert summary.reclusterings == len(rows) == 3
    assert all(0 < row["step"] <= 16 for row in rows), "none in the last fifth of 20 steps"
    assert summary.recluster_seconds == pytest.approx(sum(row["seconds"] for row in rows))


def test_reclustering_matters_and_can_be_left_out(small_config: Configs) -> None:
    with_it = train(small_config("with", method="cce", compression=4.0, recluster_count=2))
    without = train(small_config("without", method="cce", compression=4.0, recluster_count=0))
    assert (without.reclusterings, without.recluster_seconds) == (0, 0.0)
    assert with_it.best_val_bce != without.best_val_bce


@pytest.mark.parametrize("interaction_type", ["dcn", "projection"])
@pytest.mark.parametrize("adagrad", [False, True])
def test_other_models_and_optimizers(interaction_type: str, adagrad: bool, small_config: Configs) -> None:
    layers = {"interaction_branch1_layer_sizes": (16,), "interaction_branch2_layer_sizes": (16,)}
    config = small_config(interaction_type=interaction_type, adagrad=adagrad, dcn_low_rank_dim=4, **layers)
    assert 0 < train(config).best_val_bce < 2


def test_a_finished_run_is_not_overwritten_by_accident(small_config: Configs) -> None:
    first = train(small_config())
    with pytest.raises(UsageError, match="holds a finished run: give --overwrite"):
        train(small_config(seed=6))
    again = train(small_config(overwrite=True))
    assert without_times(first) == without_times(again)
    rows = read_metrics(Path(small_config().run_dir))
    assert sum(row["event"] == "eval" and row["split"] == "val" for row in rows) == 2, "metrics of both runs"


def test_divergence_names_the_step(small_config: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(learning_rate=1e30)
    with pytest.raises(TrainingDivergedError, match=r"the training loss is (nan|inf) at step \d+ \(epoch 1, batch"):
        train(config)
    assert not (Path(config.run_dir) / "summary.json").exists()


def test_command_line_prints_a_table(tmp_path: Path, data_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run_dir", str(tmp_path), "--data_path", data_path, "--epochs", "1", "--limit_train_batches", "2"]
    assert main([*flags, "--method", "cce", "--print_sharding_plan"]) == 0
    shown = capsys.readouterr().out
    for part in ("sharding plan", "re-clustering t_user, t_item, t_zip", "best val BCE", "x bytes", "epoch 1 step 2"):
        assert part in shown


def test_offline_without_a_cache_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(folder: Path) -> None:
        raise OSError("no network")

    for source in SOURCES:
        monkeypatch.setitem(vars(source), "fetch", unreachable)
    assert main(["--run_dir", str(tmp_path / "run"), "--data_path", str(tmp_path / "cache")]) == 1
    error = capsys.readouterr().err
    assert "GroupLens (https://" in error
    assert "recbole==1.2.1" in error
    assert "no network" in error
