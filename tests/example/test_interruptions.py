"""Stops on request, jobs that are started again, and what a run says of itself while it goes on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cce_torchrec.checkpoint import load_checkpoint
from dlrm_example import train as train_module
from dlrm_example.budget import plan_tables
from dlrm_example.checkpoints import complete_checkpoints
from dlrm_example.config import TrainConfig, UsageError, divide_global_batch
from dlrm_example.data import DATASETS
from dlrm_example.distributed import World
from dlrm_example.model import build_model, collection_of
from dlrm_example.records import METRICS, read_metrics
from dlrm_example.stop import StoppedError, StopRequest, StopVote
from dlrm_example.train import train
from dlrm_example.trainer import Trainer
from dlrm_example.windows import Window
from tests.distributed.harness import RankPool
from tests.example.test_resume import outcome

Configs = Callable[..., TrainConfig]

pytestmark = [
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating ShardedTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def after_steps(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Call the action with the number of every step that is done."""
    train_step = Trainer._train_step

    def step(trainer: Trainer, batches: Any) -> None:
        train_step(trainer, batches)
        action(trainer._progress.step)

    monkeypatch.setattr(Trainer, "_train_step", step)


def terminate_at(number: int) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == number else None


CCE = {"method": "cce", "compression": 4.0, "recluster_count": 4, "adagrad": True}


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no checkpoints are asked for. The request is seen one step later: it came after this one's sum."""
    undisturbed = small_config("undisturbed", **CCE)
    expected = outcome(undisturbed, train(undisturbed))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        after_steps(patch, terminate_at(4))
        with pytest.raises(StoppedError, match="stopped after step 5, with a checkpoint"):
            train(small_config(**CCE))
    assert signal.getsignal(signal.SIGTERM) == before
    config = small_config(**CCE, resume=True)
    (found,) = complete_checkpoints(Path(config.run_dir) / "checkpoints")
    assert found.step == 5
    assert outcome(config, train(config)) == expected


def test_sigterm_has_an_exit_code(
    small_config: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_steps(monkeypatch, terminate_at(2))
    monkeypatch.setattr(train_module, "parse_config", lambda argv: small_config())
    assert train_module.main([]) == 143
    assert "stopped after step 3, with a checkpoint; goes on with --resume" in capsys.readouterr().err


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    with monkeypatch.context() as patch:
        after_steps(patch, terminate_at(step))
        with pytest.raises(StoppedError):
            train(config)


def test_a_job_that_is_started_again_goes_on_untold(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, whatever TorchElastic's count of restarts says, and though it began with --overwrite."""
    config = small_config(overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    interrupted(config, monkeypatch, 7)
    steps: list[int] = []
    with monkeypatch.context() as patch:
        after_steps(patch, steps.append)
        assert train(config).steps == 12
    assert steps == [9, 10, 11, 12]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    with pytest.raises(UsageError, match="holds a finished run"):
        train(small_config())


def test_torchruns_name_for_unnamed_jobs_is_nobodys(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    interrupted(small_config(), monkeypatch, 7)
    with pytest.raises(UsageError, match="holds checkpoints: give --resume"):
        train(small_config())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(small_config()).steps == 12


def votes(rank: int, world_size: int) -> list[bool]:
    """Rank 1 is asked in the third step."""
    request = StopRequest()
    vote = StopVote(request, World(rank, world_size, torch.device("cpu")), timeout=30.0)
    passed = []
    for step in range(1, 7):
        request.made = request.made or (rank, step) == (1, 3)
        passed.append(vote.passed())
    return passed


@pytest.mark.distributed
def test_one_rank_s_request_stops_all_in_the_next_step(ranks2: RankPool) -> None:
    assert ranks2.run(votes) == [[False, False, False, True, True, True]] * 2


def test_random_numbers_go_on(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model with dropout would draw."""
    drawn: dict[str, list[tuple[int, float]]] = {"whole": [], "parts": []}

    def draw(name: str) -> Callable[[int], None]:
        return lambda step: drawn[name].append((step, torch.rand(()).item()))

    with monkeypatch.context() as patch:
        after_steps(patch, draw("whole"))
        train(small_config("whole"))
    with monkeypatch.context() as patch:
        after_steps(patch, draw("parts"))
        after_steps(patch, terminate_at(7))
        with pytest.raises(StoppedError):
            train(small_config())
    torch.rand(100)
    with monkeypatch.context() as patch:
        after_steps(patch, draw("parts"))
        train(small_config(resume=True))
    assert drawn["parts"] == drawn["whole"]


def test_a_global_batch_is_divided_by_ranks() -> None:
    config = TrainConfig(run_dir="x", global_batch_size=96)
    assert [divide_global_batch(config, size).batch_size for size in (1, 2, 4)] == [96, 48, 24]
    assert divide_global_batch(TrainConfig(run_dir="x", batch_size=7), 4).batch_size == 7
    with pytest.raises(UsageError, match="--global_batch_size 96 cannot be divided by 5 ranks; 95 can"):
        divide_global_batch(config, 5)


def test_a_window_by_its_definitions() -> None:
    """AUROC as the part of (positive, negative) pairs of all steps in the right order; batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    window = Window(World(0, 1, torch.device("cpu")))
    logits, labels = torch.randn(50, generator=generator), (torch.rand(50, generator=generator) < 0.4).float()
    for first, last, loss in ((0, 20, 0.5), (20, 50, 0.7)):
        window.add(logits[first:last], labels[first:last])
        window.losses.append(loss)
        window.seconds += 0.25
    scores = window.scores()
    positive, negative = logits[labels == 1][:, None], logits[labels == 0][None, :]
    assert scores["auroc"] == pytest.approx((positive > negative).float().mean().item(), abs=1e-6)
    assert scores["loss"] == pytest.approx(0.6)
    assert scores["samples_per_s"] == pytest.approx(100.0)


def test_windows_begin_where_training_goes_on(
    small_config: Configs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And leave the metrics alone, which are the undisturbed run's."""
    lengths: list[int] = []
    scores = Window.scores
    monkeypatch.setattr(Window, "scores", lambda self: (lengths.append(len(self.losses)), scores(self))[1])
    interrupted(small_config(log_every_steps=5), monkeypatch, 6)
    with caplog.at_level("INFO", "dlrm_example"):
        caplog.clear()
        config = small_config(log_every_steps=5, resume=True)
        train(config)
    assert lengths == [5, 3], "steps 1 to 5, and 8 to 10"
    assert sum("samples/s" in message for message in caplog.messages) == 1
    assert "samples" not in (Path(config.run_dir) / METRICS).read_text()


def test_tensorboard(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**CCE, "tensorboard": True, "log_every_steps": 4, "checkpoint_every_epochs": 2}
    interrupted(small_config(**settings), monkeypatch, 8)
    config = small_config(**settings, resume=True)
    summary = train(config)
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("window/auroc")] == [4, 8, 12]
    val = events.Scalars("val/bce")
    assert [event.step for event in val] == [6, 12]
    assert min(event.value for event in val) == pytest.approx(summary.best_val_bce)
    for name in ("bce", "auroc", "ne", "calibration"):
        rows = [row for row in read_metrics(Path(config.run_dir)) if row.get("split") == "val"]
        assert [event.value for event in events.Scalars(f"val/{name}")] == pytest.approx([row[name] for row in rows])
    assert [event.value for event in events.Scalars("window/learning_rate")] == pytest.approx([0.05] * 3)
    check_reclusterings(events, config, summary.reclusterings)


def check_reclusterings(events: Any, config: TrainConfig, count: int) -> None:
    """Scalars as in the metrics, and histograms of which the last is of the assignments in the last checkpoint."""
    rows = [row for row in read_metrics(Path(config.run_dir)) if row["event"] == "recluster"]
    tables = [{table["table"]: table for table in row["tables"]}["t_user"] for row in rows]
    assert len(rows) == count
    for name in ("relative_squared_error", "moved_fraction"):
        values = [event.value for event in events.Scalars(f"recluster/t_user/{name}")]
        assert values == pytest.approx([table[name] for table in tables])
    dataset = DATASETS[config.dataset_name](config.data_path)
    model = build_model(plan_tables(dataset.info, config), dataset.info, config)
    load_checkpoint(complete_checkpoints(Path(config.run_dir) / "checkpoints")[-1].path, model)
    assignments_VC = collection_of(model).lowered_tables[0].row_map.assignments.numpy()
    for column, clusters_V in enumerate(assignments_VC.T):
        bits = [event.value for event in events.Scalars(f"recluster/t_user/assignment_entropy_bits/column_{column}")]
        assert bits == pytest.approx([table["assignment_entropy_bits"][column] for table in tables])
        found = events.Histograms(f"recluster/t_user/assignments/column_{column}")
        assert len(found) == count
        histogram = found[-1].histogram_value
        assert histogram.num == sum(histogram.bucket) == len(clusters_V)
        shown = np.repeat(np.ceil(histogram.bucket_limit), np.array(histogram.bucket, dtype=int))
        width = histogram.bucket_limit[0]
        assert np.all(np.ceil(np.floor(np.sort(clusters_V) / width + 1) * width) == shown)


def test_tensorboard_that_is_missing(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = small_config(tensorboard=True)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        train(config)
    assert not Path(config.run_dir).exists()
