"""Make the runs that are not there yet: each in a process of its own, which a failure of another does not touch."""

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from dlrm_example.checkpoints import differences, settings_that_matter
from dlrm_example.commands import exit_code
from dlrm_example.config import TrainConfig, UsageError, divide_global_batch
from dlrm_example.console import LOGS, set_up_logging
from dlrm_example.records import CONFIG, SUMMARY, read_config, read_summary
from dlrm_example.stop import StoppedError, StopRequest, stop_on_sigterm
from dlrm_example.train import train

logger = logging.getLogger("dlrm_example.sweep")

OUTPUT = "output.log"  # in the run's `logs/`: what it printed


def is_finished(config: TrainConfig) -> bool:
    """Whether the run in the config's folder is; with which config it was made, :func:`check_unchanged` asks."""
    return (Path(config.run_dir) / SUMMARY).exists()


def check_unchanged(configs: Sequence[TrainConfig]) -> None:
    """Raise a `UsageError` where a folder holds a run, finished or begun, of another config."""
    for config in configs:
        folder = Path(config.run_dir)
        changed = differences(_settings_of(folder), _settings(config, 1)) if (folder / CONFIG).exists() else []
        if changed:
            remedy = "give another --run_dir, or remove that folder to make the run again"
            raise UsageError(f"{folder} was made with other settings: {'; '.join(changed)}. Either {remedy}.")


def _settings_of(folder: Path) -> dict[str, Any]:
    """Of the run in a folder, which may have had several ranks."""
    world_size = read_summary(folder).world_size if (folder / SUMMARY).exists() else 1
    return _settings(read_config(folder), world_size)


def _settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """What makes two runs the same; other data is another run, though a run may go on where its data has been moved."""
    if config.global_batch_size is not None:
        config, world_size = divide_global_batch(config, 1), 1
    return {**settings_that_matter(config, world_size), "data_path": config.data_path}


@dataclass
class _Clock:
    """How far, and how long it will take if the runs to come are like those before."""

    total: int
    started: float
    done: int = 0

    def tick(self, run: str, outcome: str, seconds: float) -> None:
        self.done += 1
        left = self.total - self.done
        minutes = (time.monotonic() - self.started) / self.done * left / 60
        coming = f"; {left} to come, about {minutes:.0f} minutes" if left else ""
        logger.info("[%d/%d] %s: %s (%.0f s)%s", self.done, self.total, run, outcome, seconds, coming)


def run_missing(configs: Sequence[TrainConfig], jobs: int = 1) -> dict[str, str]:
    """Make the runs that are not finished, in order; those that were interrupted go on from their checkpoints.

    Args:
        configs: runs, each with a folder of its own.
        jobs: how many at a time.

    Returns:
        Why runs failed, by the name of their folder; the others are made nevertheless.

    Raises:
        UsageError: a folder holds a run of another config; nothing has been run.
        StoppedError: by SIGTERM. Runs that were going on have saved a checkpoint.
    """
    check_unchanged(configs)
    missing = [config for config in configs if not is_finished(config)]
    logger.info("%d runs, of which %d are finished", len(configs), len(configs) - len(missing))
    with stop_on_sigterm() as stop:
        return _Pool(missing, jobs).run(stop)


def make_all(configs: Sequence[TrainConfig]) -> None:
    """As :func:`run_missing`, one at a time, where all are needed.

    Raises:
        RuntimeError: some failed.
    """
    failures = run_missing(configs)
    if failures:
        raise RuntimeError("\n".join(f"{name}: {reason}" for name, reason in failures.items()))


class _Pool:
    """Runs that wait, and those that are going on."""

    def __init__(self, missing: Sequence[TrainConfig], jobs: int) -> None:
        self._waiting, self._jobs = list(missing), jobs
        self._running: dict[int, tuple[BaseProcess, TrainConfig, float]] = {}  # by sentinel
        self._failures: dict[str, str] = {}
        self._clock = _Clock(len(missing), time.monotonic())

    def run(self, stop: StopRequest) -> dict[str, str]:
        """Until none is left."""
        try:
            while self._waiting or self._running:
                if stop.made:
                    raise StoppedError("the sweep was stopped")
                while self._waiting and len(self._running) < self._jobs:
                    self._start(self._waiting.pop(0))
                for sentinel in wait(list(self._running), timeout=1.0):
                    assert isinstance(sentinel, int)
                    self._note(*self._running.pop(sentinel))
        finally:
            self._end_all()
        return self._failures

    def _start(self, config: TrainConfig) -> None:
        process = get_context("spawn").Process(target=train_alone, args=(config,))
        process.start()
        self._running[process.sentinel] = (process, config, time.monotonic())

    def _note(self, process: BaseProcess, config: TrainConfig, started: float) -> None:
        process.join()
        folder = Path(config.run_dir)
        if process.exitcode == 0:
            summary = read_summary(folder)
            outcome = f"validation BCE {summary.best_val_bce:.4f}, test BCE {summary.test_bce:.4f}"
        else:
            outcome = self._failures[folder.name] = _why(process, folder)
        self._clock.tick(folder.name, outcome, time.monotonic() - started)

    def _end_all(self) -> None:
        """SIGTERM: they save a checkpoint, if they have begun to train."""
        for process, _, _ in self._running.values():
            process.terminate()
        for process, _, _ in self._running.values():
            process.join()


def _why(process: BaseProcess, folder: Path) -> str:
    """How a run failed: its last words, and where the others are."""
    code, log = process.exitcode, folder / LOGS / OUTPUT
    assert code is not None, "it has ended"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"FAILED with {how}: {last} ({log})"


def train_alone(config: TrainConfig) -> None:
    """A run in a process that is there for it only; what it prints goes to the run's folder.

    It stops, with a checkpoint, when the process that started it dies. One who starts the sweep again meanwhile waits.
    """
    log = Path(config.run_dir) / LOGS / OUTPUT
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        fcntl.flock(output, fcntl.LOCK_EX)  # let go when the process ends, however it does
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
        Thread(target=_stop_with_parent, daemon=True).start()
        set_up_logging()

        def run() -> None:
            train(replace(config, resume=True, overwrite=False))

        sys.exit(0 if is_finished(config) else exit_code(run))


def _stop_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "started by multiprocessing"
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
