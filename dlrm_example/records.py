"""The files of a run: `config.json`, `metrics.jsonl` and, once it is finished, `summary.json`.

Its checkpoints lie beside them (`checkpoints.py`), as do `tensorboard/` and, where there are several ranks, `logs/`.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.progress import Evaluation

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
TRAINER = "trainer.json"  # in each checkpoint's folder


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run comes to.

    `best_val_bce` and `best_val_auroc` are each the best of all evaluations. Test scores were measured at the evaluation
    with the best validation BCE; under `--evaluate_on_training_end` at the last. `train_seconds` leaves out evaluations and
    re-clusterings. `samples` are rows seen by all ranks, and `embedding_bytes` what all tables store, parameters,
    assignments and the coefficients of hashes; both are 0 in summaries from before they were counted.
    `target_auroc_step` is where `--validation_auroc` was reached, if it was.
    """

    method: str
    embedding_params: int
    full_embedding_params: int
    compression_params: float
    compression_bytes: float
    best_val_bce: float
    best_val_auroc: float
    best_step: int
    best_epoch: int
    test_bce: float
    test_auroc: float
    steps: int
    train_seconds: float
    recluster_seconds: float
    reclusterings: int
    world_size: int
    seed: int
    samples: int = 0
    embedding_bytes: int = 0
    test_ne: float | None = None
    test_calibration: float | None = None
    target_auroc_step: int | None = None


class RunFiles:
    """Writes on rank 0 only; on other ranks every call does nothing."""

    def __init__(self, run_dir: str, is_main: bool) -> None:
        self.folder = Path(run_dir)
        self._is_main = is_main

    def start(self, config: TrainConfig, about: dict[str, Any]) -> None:
        """Empty the folder of an earlier run's files, checkpoints included, and write the config.

        Raises:
            UsageError: the folder cannot be made or written.
        """
        if not self._is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SUMMARY).unlink(missing_ok=True)
            for name in (CHECKPOINTS, TENSORBOARD):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            (self.folder / METRICS).write_text("")
            self._write_config(config, about)
        except OSError as error:
            raise UsageError(f"--run_dir {self.folder} cannot be written: {error}") from None

    def start_from(self, run_dir: Path, config: TrainConfig, about: dict[str, Any], metrics_bytes: int) -> None:
        """As :meth:`start`, with the first so many bytes of another run's metrics."""
        self.start(config, about)
        if self._is_main:
            (self.folder / METRICS).write_bytes((run_dir / METRICS).read_bytes()[:metrics_bytes])

    def go_on(self, config: TrainConfig, about: dict[str, Any], metrics_bytes: int) -> None:
        """Forget the metrics that were logged after a checkpoint.

        Raises:
            UsageError: there are fewer than at the checkpoint.
        """
        if not self._is_main:
            return
        metrics = self.folder / METRICS
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < metrics_bytes:
            raise UsageError(
                f"--resume: {metrics} has {size} bytes, and had {metrics_bytes} when the checkpoint was saved"
            )
        os.truncate(metrics, metrics_bytes)
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self._write_config(config, about)

    def _write_config(self, config: TrainConfig, about: dict[str, Any]) -> None:
        write_json(self.folder / CONFIG, {**dataclasses.asdict(config), **about})

    def are_of(self, job: str | None) -> bool:
        """Whether this job began the run that is in the folder."""
        config = self.folder / CONFIG
        return job is not None and config.exists() and read_json(config).get("elastic_job") == job

    def metrics_bytes(self) -> int:
        """How long the metrics are, once they are safe on disk; 0 on other ranks than the first."""
        if not self._is_main:
            return 0
        with open(self.folder / METRICS, "rb+") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def log(self, **row: Any) -> None:
        """Append one line to the metrics; on disk before the call returns, whatever happens next."""
        if self._is_main:
            with open(self.folder / METRICS, "a") as file:
                file.write(json.dumps(row) + "\n")

    def log_evaluation(self, evaluation: Evaluation, train_bce: float | None = None) -> None:
        """One line a split."""
        where = {"step": evaluation.step, "epoch": evaluation.epoch}
        if train_bce is not None:
            self.log(event="eval", split="train", **where, bce=train_bce, auroc=None)
        for split, scores in evaluation.by_split().items():
            self.log(event="eval", split=split, **where, **dataclasses.asdict(scores))

    def finish(self, summary: Summary) -> None:
        if self._is_main:
            write_json(self.folder / SUMMARY, dataclasses.asdict(summary))


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise a `UsageError` where a run would be lost without `--overwrite`."""
    if overwrite:
        return
    if (folder / SUMMARY).exists():
        raise UsageError(f"--run_dir {folder} holds a finished run: give --overwrite, or another folder")
    if any((folder / CHECKPOINTS).glob(f"*/{TRAINER}")):
        raise UsageError(f"--run_dir {folder} holds checkpoints: give --resume to go on, or --overwrite to start again")


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end: a reader never sees a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replace_atomically(path) as temporary, open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def read_config(folder: Path) -> TrainConfig:
    """The config of a run.

    Raises:
        UsageError: there is no run.
    """
    try:
        content = read_json(folder / CONFIG)
    except OSError as error:
        raise UsageError(f"--run_dir {folder} has no {CONFIG} that can be read: {error}") from error
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    values: dict[str, Any] = {name: content[name] for name in known if name in content}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TrainConfig(**values)


def read_summary(folder: Path) -> Summary:
    return Summary(**json.loads((folder / SUMMARY).read_text()))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
