"""Interrupted runs go on as if nothing had happened; what is not complete or does not fit is not gone on from."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cce_torchrec import recluster_in_background
from cce_torchrec.recluster import schedule
from cce_torchrec.recluster.gradients import collections_to_recluster
from dlrm_example import checkpoints
from dlrm_example.checkpoints import complete_checkpoints, remove_all_but_the_last_and_best
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.records import METRICS, SUMMARY, Summary, read_metrics, write_json
from dlrm_example.train import train
from dlrm_example.trainer import Trainer

Configs = Callable[..., TrainConfig]
Interrupt = Callable[[int], None]
STEPS = 6  # an epoch
SCHEDULE = {"lr_warmup_steps": STEPS + 3, "lr_decay_start": 2 * STEPS, "lr_decay_steps": STEPS + 4}
TIMES = ("train_seconds", "recluster_seconds", "seconds")

pytestmark = [
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating ShardedTensor:FutureWarning"),
]


class Interrupted(Exception):
    """A run is stopped from outside."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """`interrupt(n)`: runs stop after n of their own steps; 0 for never."""
    train_step = Trainer._train_step

    def after(steps: int) -> None:
        done = 0

        def step(trainer: Trainer, batches: Any) -> None:
            nonlocal done
            if steps and done == steps:
                raise Interrupted
            done += 1
            train_step(trainer, batches)

        monkeypatch.setattr(Trainer, "_train_step", step)

    return after


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name not in TIMES}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def outcome(config: TrainConfig, summary: Summary) -> Any:
    """All that a run leaves, but for times."""
    return without_times([vars(summary), read_metrics(Path(config.run_dir))])


def steps_of(config: TrainConfig) -> list[int]:
    return [found.step for found in complete_checkpoints(Path(config.run_dir) / "checkpoints")]


@pytest.mark.parametrize(
    ("stops", "settings"),
    [
        ((2 * STEPS + 3,), {"method": "cce", "compression": 4.0, "recluster_count": 5, "adagrad": True}),
        ((STEPS, STEPS + 1), {"method": "cce", "compression": 4.0, "recluster_optimizer_state": "carry"}),
        ((STEPS + 5,), {"method": "full", "embedding_optimizer": "adagrad", "checkpoint_best": False}),
        ((STEPS + 2, 5), {"method": "full", "embedding_optimizer": "sgd", "learning_rate": 0.5, **SCHEDULE}),
        ((STEPS + 4,), {"method": "cce", "compression": 4.0, "adagrad": True, **SCHEDULE}),
        ((3,), {"method": "hashing_trick", "compression": 4.0, "adagrad": True}),
        (
            (STEPS + 5, 4),
            {"method": "cce", "compression": 4.0, "recluster_count": 5, "checkpoint_every_steps": 4, "adagrad": True},
        ),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one(
    stops: tuple[int, ...], settings: dict[str, Any], small_config: Configs, interrupt: Interrupt
) -> None:
    """Bit by bit: scores, losses, re-clusterings; also where it is stopped again, or before the first checkpoint."""
    settings = {"epochs": 4, "validation_freq_within_epoch": 2, **settings}
    undisturbed = small_config("undisturbed", **settings)
    expected = outcome(undisturbed, train(undisturbed))
    for number, steps in enumerate(stops):
        interrupt(steps)
        with pytest.raises(Interrupted):
            train(small_config("disturbed", **settings, checkpoint_every_epochs=1, resume=number > 0))
    interrupt(0)
    config = small_config("disturbed", **settings, checkpoint_every_epochs=1, resume=True)
    summary = train(config)
    assert outcome(config, summary) == expected
    val = {row["step"]: row["bce"] for row in read_metrics(Path(config.run_dir)) if row.get("split") == "val"}
    bests = {step for step in val if val[step] < min((val[other] for other in val if other < step), default=math.inf)}
    every = settings.get("checkpoint_every_steps")
    asked_for = {step for step in range(1, 4 * STEPS + 1) if step % STEPS == 0 or (every and step % every == 0)}
    saved = sorted(asked_for | (bests if config.checkpoint_best else set()))
    best = min(val.keys() & saved, key=val.__getitem__)
    assert set(steps_of(config)) == {*saved[-2:], best}
    index = json.loads((Path(config.run_dir) / "checkpoints" / "index.json").read_text())
    assert index == {"last": f"step_{4 * STEPS}", "best": f"step_{best}"}
    assert summary.samples == 4 * STEPS * 64
    assert without_times(vars(train(config))) == without_times(vars(summary)), "a finished run has no steps left"


def test_a_reclustering_beside_the_training_is_committed_after_a_stop(
    small_config: Configs, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it is under way, with the gradients that it was begun from in the checkpoint."""
    config = small_config(
        "run",
        **{"method": "cce", "compression": 4.0, "epochs": 4, "checkpoint_every_steps": 14},
        **{"recluster_count": 1, "recluster_stop_after": 0.5, "recluster_background_steps": 9},
    )
    taken = []

    def begin(module: nn.Module, **options: Any) -> Any:
        under_way = recluster_in_background(module, **options)
        (collection,) = collections_to_recluster(module)
        taken.append({table: set(sums.sums()[0].tolist()) for table, sums in under_way.gradients(collection).items()})
        return under_way

    monkeypatch.setattr(schedule, "recluster_in_background", begin)
    interrupt(15)
    with pytest.raises(Interrupted):
        train(config)
    interrupt(0)
    train(replace(config, resume=True))
    assert [row["step"] for row in read_metrics(Path(config.run_dir)) if row["event"] == "recluster"] == [12 + 9]
    assert len(taken) == 2
    for table, ids in taken[0].items():
        assert ids
        assert ids <= taken[1][table], "and those of the step before it is begun again"
        assert len(taken[1][table] - ids) <= 64


def test_a_failing_save_leaves_the_checkpoint_before_it(small_config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(small_config("whole", epochs=3))
    config = small_config(epochs=3, checkpoint_every_epochs=1)
    save_checkpoint = checkpoints.save_checkpoint

    def fail_after_writing(path: Path, *args: Any) -> None:
        save_checkpoint(path, *args)
        if path.name == f".step_{2 * STEPS}":
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", fail_after_writing)
        with pytest.raises(Interrupted):
            train(config)
    assert (Path(config.run_dir) / "checkpoints" / f".step_{2 * STEPS}" / ".metadata").exists()
    assert not (Path(config.run_dir) / "checkpoints" / f"step_{2 * STEPS}").exists(), "what is visible is complete"
    assert steps_of(config) == [STEPS]
    resumed = train(small_config(epochs=3, checkpoint_every_epochs=1, resume=True))
    assert without_times(vars(resumed)) == without_times(vars(whole))


def test_every_so_many_epochs_and_after_the_last(small_config: Configs) -> None:
    config = small_config(epochs=5, limit_train_batches=1, checkpoint_every_epochs=2)
    train(config)
    assert set(steps_of(config)) >= {4, 5}
    assert set(steps_of(config)) <= {2, 4, 5}


def made_up(folder: Path, val_bce: list[float]) -> None:
    for step, bce in enumerate(val_bce, 1):
        progress = {
            "step": step,
            "evaluations": [{"step": 0, "val": {"bce": 0.0}}, {"step": step, "val": {"bce": bce}}],
        }
        path = folder / f"step_{step}"
        path.mkdir(parents=True)
        (path / "data").write_text("")
        write_json(path / "trainer.json", {"settings": {}, "progress": progress, "metrics_bytes": 0})


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    made_up(tmp_path, [0.5, 0.4, 0.45, 0.7, 0.6])
    (tmp_path / "step_1" / "trainer.json").unlink()
    (tmp_path / ".step_6").mkdir()
    remove_all_but_the_last_and_best(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step_2", "step_4", "step_5"]


def test_weights_that_were_not_evaluated_are_not_the_best(tmp_path: Path) -> None:
    made_up(tmp_path, [0.5, 0.4, 0.3, 0.7, 0.6])
    trainer = tmp_path / "step_3" / "trainer.json"
    content = json.loads(trainer.read_text())
    content["progress"]["evaluations"][-1]["step"] = 2
    write_json(trainer, content)
    remove_all_but_the_last_and_best(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step_2", "step_4", "step_5"]


def test_the_last_is_that_of_the_most_steps(tmp_path: Path) -> None:
    made_up(tmp_path, [0.5] * 11)
    assert [found.step for found in complete_checkpoints(tmp_path)] == list(range(1, 12))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "made with other settings: seed was 5 and is 6"),
        ({"epochs": 3, "learning_rate": 0.1}, "epochs was 2 and is 3; learning_rate was 0.05 and is 0.1"),
        ({"batch_size": 32}, r"rows a step \(batch_size x ranks\) was 64 and is 32"),
        ({"method": "cce", "compression": 4.0}, "method was full and is cce"),
        ({"resume": False}, "holds checkpoints: give --resume to go on, or --overwrite to start again"),
    ],
)
def test_another_run_is_refused_and_nothing_touched(
    changes: dict[str, Any], message: str, small_config: Configs, interrupt: Interrupt
) -> None:
    config = small_config(checkpoint_every_epochs=1)
    interrupt(STEPS + 2)
    with pytest.raises(Interrupted):
        train(config)
    before = files(Path(config.run_dir))
    with pytest.raises(UsageError, match=message):
        train(small_config(**{"checkpoint_every_epochs": 1, "resume": True, **changes}))
    assert files(Path(config.run_dir)) == before


def test_what_does_not_matter_may_differ(small_config: Configs, interrupt: Interrupt) -> None:
    interrupt(STEPS + 2)
    with pytest.raises(Interrupted):
        train(small_config(checkpoint_every_epochs=1))
    interrupt(0)
    changes = {"test_batch_size": 100, "collective_timeout": 60.0, "print_progress": False}
    assert train(small_config(resume=True, **changes)).steps == 2 * STEPS


def test_lost_metrics_are_an_error(small_config: Configs) -> None:
    config = small_config(checkpoint_every_epochs=1)
    train(config)
    (Path(config.run_dir) / METRICS).write_text("")
    with pytest.raises(UsageError, match=r"metrics.jsonl has 0 bytes, and had \d+ when the checkpoint was saved"):
        train(small_config(resume=True))


def test_overwrite_removes_checkpoints(small_config: Configs) -> None:
    train(small_config(checkpoint_every_epochs=1))
    config = small_config(overwrite=True)
    train(config)
    assert steps_of(config) == []


def test_nothing_to_resume_starts_afresh_and_says_so(small_config: Configs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dlrm_example"):
        config = small_config(resume=True, epochs=1)
        assert train(config).steps == STEPS
    assert "no complete checkpoint in" in caplog.text
    with pytest.raises(UsageError, match="holds a finished run"):
        train(config)
    assert json.loads((Path(config.run_dir) / SUMMARY).read_text())["steps"] == STEPS
