"""When a run evaluates, tests, saves and ends: AUROC targets, best checkpoints, full disks."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cce_torchrec.checkpoint import load_checkpoint
from dlrm_example import train as train_module
from dlrm_example.budget import plan_tables
from dlrm_example.checkpoints import CheckpointFailedError, Checkpoints, complete_checkpoints
from dlrm_example.config import TrainConfig
from dlrm_example.data import DATASETS
from dlrm_example.metrics import evaluate
from dlrm_example.model import build_model
from dlrm_example.progress import Progress
from dlrm_example.records import read_metrics
from dlrm_example.train import train
from tests.distributed.harness import RankPool
from tests.example.test_resume import outcome
from tests.example.test_two_ranks import run

Configs = Callable[..., TrainConfig]
STEPS = 6  # an epoch of small_config
LEARNS = {"adagrad": True, "limit_train_batches": None, "batch_size": 2048, "epochs": 2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def rows_of(config: TrainConfig, split: str) -> list[dict[str, float]]:
    return [row for row in read_metrics(Path(config.run_dir)) if row.get("split") == split]


def folder_of(config: TrainConfig) -> Path:
    return Path(config.run_dir) / "checkpoints"


def test_a_run_ends_at_its_auroc(small_config: Configs, caplog: pytest.LogCaptureFixture) -> None:
    """At the first evaluation that has it, within an epoch; started again, it trains no further."""
    whole = small_config("whole", **LEARNS, validation_freq_within_epoch=9)
    assert train(whole).target_auroc_step is None
    val = rows_of(whole, "val")
    target = val[len(val) // 2]["auroc"]
    step = next(row["step"] for row in val if row["auroc"] >= target)
    config = small_config(**LEARNS, validation_freq_within_epoch=9, validation_auroc=target, checkpoint_every_epochs=4)
    with caplog.at_level("INFO", "dlrm_example"):
        summary = train(config)
    assert (summary.steps, summary.target_auroc_step) == (step, step)
    assert f"reached --validation_auroc {target:g} at step {step}" in caplog.text
    assert rows_of(config, "val") == val[: val.index(next(row for row in val if row["step"] == step)) + 1]
    assert complete_checkpoints(folder_of(config))[-1].step == step
    again = train(small_config(**vars(config) | {"resume": True}))
    assert (again.steps, again.test_bce) == (step, summary.test_bce)


def test_the_test_split_at_the_end_only(small_config: Configs) -> None:
    at_bests = small_config("at_bests", validation_freq_within_epoch=2)
    at_end = small_config("at_end", validation_freq_within_epoch=2, evaluate_on_training_end=True)
    train(at_bests)
    summary = train(at_end)
    assert rows_of(at_end, "val") == rows_of(at_bests, "val")
    (row,) = rows_of(at_end, "test")
    assert row["step"] == 2 * STEPS
    assert (summary.test_bce, summary.test_auroc) == (row["bce"], row["auroc"])
    assert (summary.test_ne, summary.test_calibration) == (row["ne"], row["calibration"])


def test_the_test_split_where_a_target_ends_the_training(small_config: Configs) -> None:
    config = small_config(**LEARNS, validation_auroc=0.501, evaluate_on_training_end=True)
    summary = train(config)
    assert [row["step"] for row in rows_of(config, "test")] == [summary.target_auroc_step]


@pytest.mark.parametrize(("every", "steps"), [(None, [18]), (5, [5, 10, 15, 18])])
def test_epochs_that_are_not_evaluated(every: int | None, steps: list[int], small_config: Configs) -> None:
    config = small_config(epochs=3, evaluate_on_epoch_end=False, validation_freq_within_epoch=every)
    train(config)
    assert [row["step"] for row in rows_of(config, "val")] == steps


def test_the_best_weights_are_saved(small_config: Configs) -> None:
    """Those with the best of all validation scores, between the checkpoints that were asked for, score it again."""
    settings = {"epochs": 3, "learning_rate": 0.5, "validation_freq_within_epoch": 1, "checkpoint_every_epochs": 3}
    config = small_config(**settings)
    summary = train(config)
    assert summary.best_step % STEPS, "or the test is of nothing"
    index = json.loads((folder_of(config) / "index.json").read_text())
    assert index == {"last": f"step_{3 * STEPS}", "best": f"step_{summary.best_step}"}
    dataset = DATASETS[config.dataset_name](config.data_path)
    model = build_model(plan_tables(dataset.info, config), dataset.info, config)
    load_checkpoint(folder_of(config) / index["best"], model)
    loader = dataset.loader("val", batch_size=config.test_batch_size)
    scores = evaluate(model, loader, torch.device("cpu"), title="val", progress=False)
    assert scores.bce == pytest.approx(summary.best_val_bce, rel=1e-6)
    only_asked = small_config("only_asked", **settings, checkpoint_best=False)
    train(only_asked)
    assert [found.step for found in complete_checkpoints(folder_of(only_asked))] == [3 * STEPS]


@contextmanager
def disk_that_is_full(num_bytes: int) -> Iterator[None]:
    """The system lets no file grow above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def error_of_a_full_disk(rank: int, world_size: int, config: TrainConfig, num_bytes: int) -> str:
    """The disk of the last rank is full when the second checkpoint is saved."""
    save = Checkpoints.save

    def save_on_a_full_disk(self: Checkpoints, model: Any, optimizer: Any, progress: Progress, size: int) -> None:
        is_full = progress.step == 2 * STEPS and rank == world_size - 1
        with disk_that_is_full(num_bytes) if is_full else nullcontext():
            save(self, model, optimizer, progress, size)

    with mock.patch.object(Checkpoints, "save", save_on_a_full_disk), pytest.raises(CheckpointFailedError) as caught:
        run(rank, world_size, config)
    return str(caught.value)


@pytest.mark.parametrize("num_bytes", [1_000, 40_000], ids=["random_state", "weights"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk(num_bytes: int, world_size: int, small_config: Configs, ranks2: RankPool) -> None:
    """Every rank says so; what was there is whole, nothing half-written is left, and the run goes on from it."""
    settings = {"epochs": 3, "batch_size": 64 // world_size, "checkpoint_every_epochs": 1}
    config = small_config(**settings)
    if world_size == 1:
        errors = [error_of_a_full_disk(0, 1, config, num_bytes)]
    else:
        errors = ranks2.run(error_of_a_full_disk, config, num_bytes)
    last, failed = folder_of(config) / "step_6", folder_of(config) / "step_12"
    for error in errors:
        assert f"{failed} could not be saved (" in error
        assert f"the last complete checkpoint is {last}: if the disk is full, make room" in error
    assert sorted(path.name for path in folder_of(config).iterdir()) == ["index.json", "step_6"]
    if world_size == 1:
        undisturbed = small_config("undisturbed", **settings)
        expected = outcome(undisturbed, train(undisturbed))
        resumed = small_config(**settings, resume=True)
        assert outcome(resumed, train(resumed)) == expected


def test_a_full_disk_has_an_exit_code(
    small_config: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(checkpoint_every_epochs=1)
    monkeypatch.setattr(train_module, "parse_config", lambda argv: config)
    with disk_that_is_full(40_000):
        assert train_module.main([]) == 1
    assert "the last complete checkpoint is none" in capsys.readouterr().err
