"""Sweeps: which runs they make, which they do not make again, and what they leave where something goes wrong."""

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from threading import Thread

import pytest

from dlrm_example.cli import parse_config
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.records import (
    CONFIG,
    SUMMARY,
    RunFiles,
    read_config,
    read_json,
    read_metrics,
    write_json,
)
from dlrm_example.sweep.__main__ import main, read_floors
from dlrm_example.sweep.cli import leave_out_unfit, parse_sweep
from dlrm_example.sweep.grid import Case, expand
from dlrm_example.sweep.runs import check_unchanged, is_finished, run_missing
from dlrm_example.train import train
from launch.components import _read_runs
from tests.example.test_budget import INFO
from tests.example.test_resume import without_times
from tests.scripts import ROOT

SIZES = ["--embedding_dim", "8", "--dense_arch_layer_sizes", "8,8", "--over_arch_layer_sizes", "8,1", "--adagrad"]
SHORT = [*SIZES, "--epochs", "2", "--limit_train_batches", "6", "--batch_size", "64", "--checkpoint_every_epochs", "0"]


def test_the_grid_is_made_seed_by_seed_with_full_tables_first() -> None:
    cases = expand(["cce", "full", "robe", "cce"], [4.0, 2.5, 4.0], range(1, 3))
    sizes = [("full", 1.0), ("cce", 4.0), ("cce", 2.5), ("robe", 4.0), ("robe", 2.5)]
    assert cases == [Case(*size, seed) for seed in (1, 2) for size in sizes]


def test_names_are_those_of_clusters_and_differ() -> None:
    cases = expand(["cce", "cce_robe", "hashing_trick"], [1, 2.5, 25, 2_000_000.0], range(1, 12))
    names = [case.name for case in cases]
    assert len(set(names)) == len(cases) == 11 * 13
    assert {"full-seed1", "hashing-trick-2-5x-seed11", "cce-2000000x-seed1"} < set(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_every_run_has_its_cases_flags_and_all_others() -> None:
    config = parse_sweep(
        ["--methods", "cce,ce", "--compressions", "4,2.5", "--seeds", "2", "--run_dir", "runs/x", *SHORT]
    )
    runs = config.runs()
    assert len(runs) == 2 * (1 + 2 * 2)
    for case, run in runs.items():
        expected = parse_config([*SHORT, "--run_dir", f"runs/x/{case.name}", "--method", case.method, *case.flags[2:]])
        assert run == expected
        assert (run.method, run.compression, run.seed) == (case.method, case.compression, case.seed)


@pytest.mark.parametrize(
    "options", [["--method_options", "num_columns=2", "seed=7"], ["--method_options=num_columns=2"]], ids=str
)
def test_full_tables_are_made_without_the_options_of_methods(options: list[str]) -> None:
    runs = parse_sweep(["--methods", "cce", "--seeds", "1", *options, *SHORT]).runs()
    for case, run in runs.items():
        assert run.method_options.get("num_columns") == (None if case.method == "full" else 2)
        assert run.embedding_dim == 8


def test_the_list_is_what_the_launcher_reads(
    data_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--methods", "cce,hashing_trick", "--compressions", "2.5", "--seeds", "2"]
    flags = [*grid, "--run_dir", str(tmp_path / "sweep"), "--data_path", data_path, *SHORT]
    assert main([*flags, "--list"]) == 0
    (tmp_path / "runs.txt").write_text(capsys.readouterr().out)
    assert not (tmp_path / "sweep").exists()
    assert _read_runs(str(tmp_path / "runs.txt")) == {case.name: case.flags for case in parse_sweep(flags).runs()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method cce", "--method is up to the sweep: give --methods"),
        ("--seed=4", "--seed is up to the sweep: give --seeds"),
        ("--overwrite", "--overwrite is up to the sweep"),
        ("--seeds 0", "--seeds is 0; it must be 1 or more"),
        ("--compressions 4,0.5", "--compressions has 0.5; it must be 1 or more"),
        ("--methods cce,cec", "--method 'cec' is unknown"),
        ("--epochs 0", "--epochs is 0"),
        ("--truth nothing.json", "--truth nothing.json is no truth.json"),
    ],
)
def test_flags_that_cannot_be(
    flags: str, message: str, data_path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*flags.split(), "--run_dir", str(tmp_path / "sweep"), "--data_path", data_path]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="start it without torchrun"):
        parse_sweep([])


def test_what_does_not_fit_is_left_out() -> None:
    flags = ["--methods", "cce,ce", "--seeds", "2", "--run_dir", "runs/x"]
    fitting, unfit = leave_out_unfit(parse_sweep([*flags, "--compressions", "4,100000"]).runs(), INFO)
    assert {(case.method, case.compression) for case in fitting} == {("full", 1.0), ("cce", 4.0), ("ce", 4.0)}
    assert list(unfit) == ["cce 100000x", "ce 100000x"]
    assert "works here" in unfit["ce 100000x"]
    with pytest.raises(UsageError, match="no method fits at any of these compressions"):
        leave_out_unfit(parse_sweep([*flags, "--compressions", "100000"]).runs(), INFO)


def finished(config: TrainConfig, world_size: int = 1) -> None:
    """What a run would leave that is looked at here."""
    files = RunFiles(config.run_dir, is_main=True)
    files.start(config, {})
    write_json(files.folder / SUMMARY, {**SUMMARY_VALUES, "world_size": world_size})


SUMMARY_VALUES = {
    **{"method": "cce", "embedding_params": 1, "full_embedding_params": 1, "compression_params": 1.0},
    **{"compression_bytes": 1.0, "best_val_bce": 0.5, "best_val_auroc": 0.8, "best_step": 1, "best_epoch": 1},
    **{"test_bce": 0.6, "test_auroc": 0.7, "steps": 1, "train_seconds": 1.0, "recluster_seconds": 0.0},
    **{"reclusterings": 0, "seed": 1},
}


def test_a_run_is_known_by_its_settings(tmp_path: Path) -> None:
    """However many ranks and threads it had; other data are other settings."""

    def config(**changes: object) -> TrainConfig:
        return TrainConfig(run_dir=str(tmp_path / "run"), **{"batch_size": 64, **changes})  # type: ignore[arg-type]

    check_unchanged([config()])
    finished(config(batch_size=16, num_threads=2), world_size=4)
    check_unchanged([config(), config(global_batch_size=64, batch_size=1)])
    assert is_finished(config())
    with pytest.raises(UsageError, match=r"run was made with other settings: .*was 64 and is 16"):
        check_unchanged([config(batch_size=16)])
    with pytest.raises(UsageError, match="data_path was None and is /there"):
        run_missing([config(data_path="/there")])


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_failure_is_told_the_others_are_made_and_only_what_is_missing_is_made_again(
    data_path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    grid = ["--methods", "cce", "--compressions", "4,100000", "--seeds", "1", "--run_dir", str(folder), "--jobs", "2"]
    flags = [*grid, "--data_path", data_path, *SHORT]
    obstacle = folder / "cce-4x-seed1" / "metrics.jsonl"
    obstacle.mkdir(parents=True)
    assert main(flags) == 1
    told = capfd.readouterr()
    assert "error: cce-4x-seed1: FAILED with exit code 2: error: --run_dir" in told.err
    assert str(folder / "cce-4x-seed1" / "logs" / "output.log") in told.err
    assert "Not finished: `cce-4x-seed1`." in (folder / "sweep.md").read_text()
    obstacle.rmdir()
    full = snapshot(folder / "full-seed1")

    assert main(flags) == 0
    assert "2 runs, of which 1 are finished" in capfd.readouterr().out
    assert snapshot(folder / "full-seed1") == full, "it was made already"
    with open(folder / "sweep.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["full-seed1", "cce-4x-seed1"]
    for name, row in rows.items():
        summary, config = (read_json(folder / name / kind) for kind in (SUMMARY, CONFIG))
        assert {key: row[key] for key in summary} == {
            key: "" if value is None else str(value) for key, value in summary.items()
        }
        assert (row["commit"], row["hardware"]) == (config["commit"], config["hardware"])
    page = (folder / "sweep.md").read_text()
    assert f"{float(rows['cce-4x-seed1']['test_bce']):.4f}" in page
    assert "Not finished" not in page
    assert "Does not fit: --compression 100000" in page
    for split in ("val", "test"):
        assert (folder / f"sweep_{split}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](sweep_{split}.png)" in page

    before = snapshot(folder)
    assert main([*flags, "--learning_rate", "0.5"]) == 2
    assert "full-seed1 was made with other settings: learning_rate was 0.05 and is 0.5" in capfd.readouterr().err
    assert snapshot(folder) == before


def test_floors_are_those_of_the_splits(tmp_path: Path) -> None:
    write_json(tmp_path / "truth.json", {"splits": {"val": {"bayes_log_loss": 0.3}, "test": {"bayes_log_loss": 0.4}}})
    assert read_floors(str(tmp_path / "truth.json")) == {"val": 0.3, "test": 0.4}


def last_step(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*")), default=0)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop_at(run_dir: Path, step: int) -> None:
    wait_for_step(run_dir, step)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_an_interrupted_sweep_goes_on(data_path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Asked to stop, then killed, it ends as an undisturbed run, though the killed sweep's run was still going on."""
    folder, run_dir = tmp_path / "sweep", tmp_path / "sweep" / "full-seed1"
    sizes = [*SIZES, "--epochs", "8", "--limit_train_batches", "150", "--batch_size", "32", "--no-print_progress"]
    shared = [*sizes, "--checkpoint_every_steps", "20", "--data_path", data_path]
    flags = ["--methods", "full", "--seeds", "1", "--run_dir", str(folder), *shared]
    stopper = Thread(target=stop_at, args=(run_dir, 40))
    stopper.start()
    assert main(flags) == 143
    stopper.join()
    assert "the sweep was stopped; goes on when the same command is given again" in capfd.readouterr().err

    command = [sys.executable, "-W", "ignore", "-m", "dlrm_example.sweep", *flags]
    stopped_at = last_step(run_dir)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_step(run_dir, stopped_at + 40)
        finally:
            process.kill()
    assert main(flags) == 0
    output = (run_dir / "logs" / "output.log").read_text()
    assert output.count("resumed from") == 2, output
    assert output.count("with a checkpoint; goes on with --resume") == 2, "the orphan stopped by itself"
    alone = parse_config([*shared, "--method", "full", "--seed", "1", "--run_dir", str(tmp_path / "alone")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(alone)
    assert without_times(read_metrics(run_dir)) == without_times(read_metrics(tmp_path / "alone"))
    summaries = [without_times(read_json(place / SUMMARY)) for place in (run_dir, tmp_path / "alone")]
    assert summaries[0] == summaries[1]
    assert read_config(run_dir).resume
