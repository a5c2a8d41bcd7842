"""Checkpoints of a run, in `run_dir/checkpoints/step_N`, and which of them to go on from.

A folder holds what `cce_torchrec.checkpoint` writes, every rank's random state, and `trainer.json`: how far the training
was, and of what config. That file is written last. The folder has a hidden name, `.step_N`, until all ranks have written
all of it; then rank 0 renames it. What is called `step_N` is complete. `index.json` names the last of them, and the best by
validation BCE. A save that fails, as on a full disk, leaves all of this as it was.

Where to go on in the data is a function of the step: the order of an epoch's batches follows from the seed and its number.
So does a re-clustering. Batches that the pipeline has in flight when a checkpoint is taken are read again.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.optim import Optimizer

from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.distributed import World, on_every_rank, on_main_rank
from dlrm_example.progress import Progress
from dlrm_example.random_state import load_random_state, save_random_state
from dlrm_example.records import CHECKPOINTS, TRAINER, read_json, write_json

logger = logging.getLogger(__name__)

INDEX = "index.json"
KEEP_LAST = 2
ROWS_A_STEP = "rows a step (batch_size x ranks)"  # among the settings
MAY_DIFFER = (  # in the run that goes on; `batch_size` is compared as rows a step over all ranks
    *(
        "run_dir",
        "data_path",
        "test_batch_size",
        "batch_size",
        "global_batch_size",
        "num_threads",
        "resume",
        "overwrite",
    ),
    *("checkpoint_every_epochs", "checkpoint_every_steps", "log_every_steps", "tensorboard", "print_sharding_plan"),
    *("print_progress", "collective_timeout", "checkpoint_best"),
)


class CheckpointFailedError(RuntimeError):
    """A checkpoint could not be written; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: where it is, and what its `trainer.json` says."""

    path: Path
    settings: Mapping[str, Any]
    progress: Mapping[str, Any]
    metrics_bytes: int

    @property
    def step(self) -> int:
        return int(self.progress["step"])

    @property
    def val_bce(self) -> float:
        """Of these very weights; infinite where they were not evaluated."""
        evaluations = self.progress["evaluations"]
        if not evaluations or evaluations[-1]["step"] != self.step:
            return math.inf
        return float(evaluations[-1]["val"]["bce"])


class Checkpoints:
    """Saves and loads; every method is collective, and rank 0 alone touches folders and `trainer.json`."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._folder = Path(config.run_dir) / CHECKPOINTS
        self._config, self._world = config, world

    def is_due(self, progress: Progress, steps_per_epoch: int) -> bool:
        """After every so many steps; after every so many epochs, and after the last; when validation is the best so far."""
        every_epochs, every_steps = self._config.checkpoint_every_epochs, self._config.checkpoint_every_steps
        if every_epochs == 0 and every_steps is None:
            return False
        if every_steps is not None and progress.step % every_steps == 0:
            return True
        if self._config.checkpoint_best and progress.is_best:
            return True
        if progress.step_of(self._config.validation_auroc) is not None:
            return True
        epoch, within = divmod(progress.step, steps_per_epoch)
        return every_epochs > 0 and not within and (epoch % every_epochs == 0 or epoch == self._config.epochs)

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress, metrics_bytes: int) -> None:
        """Add a checkpoint; then remove all but the last two and the best.

        Raises:
            CheckpointFailedError: on every rank; the checkpoints before it are as they were.
        """
        path = self._folder / f"step_{progress.step}"
        hidden = path.with_name(f".{path.name}")
        content = {
            "settings": settings_that_matter(self._config, self._world.size),
            "progress": progress.to_json(),
            "metrics_bytes": metrics_bytes,
        }
        try:
            on_main_rank(self._world, lambda: _make_empty(hidden))
            on_every_rank(self._world, lambda: save_random_state(hidden, self._world))
            save_checkpoint(hidden, model, optimizer)  # returns when all ranks have written
            on_main_rank(self._world, lambda: self._show(hidden, path, content))
        except (OSError, CheckpointException) as error:
            if self._world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
            reason = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
            raise CheckpointFailedError(
                f"{path} could not be saved ({reason}); the last complete checkpoint is {self.last_path()}: if the disk is "
                "full, make room; then go on with --resume"
            ) from error

    def last_path(self) -> str:
        """Of the last complete checkpoint, in words."""
        found = on_main_rank(self._world, lambda: complete_checkpoints(self._folder))
        return str(found[-1].path) if found else "none"

    def _show(self, hidden: Path, path: Path, content: dict[str, Any]) -> None:
        write_json(hidden / TRAINER, content)
        _remove(path)
        hidden.rename(path)
        remove_all_but_the_last_and_best(self._folder)

    def load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Put model and optimizer in the state of the checkpoint.

        Raises:
            UsageError: on every rank, with nothing changed, where it does not fit.
        """
        try:
            load_checkpoint(checkpoint.path, model, optimizer)
        except ValueError as error:
            raise UsageError(f"--resume: {checkpoint.path}: {error}") from error
        load_random_state(checkpoint.path, self._world)
        progress = Progress.from_json(dict(checkpoint.progress))
        logger.info("resumed from %s (epoch %d of %d)", checkpoint.path, progress.epoch, self._config.epochs)
        return progress


def find_checkpoint(config: TrainConfig, world_size: int) -> Checkpoint | None:
    """The last complete checkpoint in the run's folder, if there is one.

    Raises:
        UsageError: it is of another training than the config's; the message lists the differences.
    """
    found = complete_checkpoints(Path(config.run_dir) / CHECKPOINTS)
    if not found:
        return None
    changed = differences(found[-1].settings, settings_that_matter(config, world_size))
    if changed:
        raise UsageError(f"--resume: {found[-1].path} was made with other settings: {'; '.join(changed)}")
    return found[-1]


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """By step."""
    files = [path / TRAINER for path in folder.glob("step_*") if (path / TRAINER).exists()]
    return sorted((Checkpoint(path=file.parent, **read_json(file)) for file in files), key=lambda found: found.step)


def remove_all_but_the_last_and_best(folder: Path) -> None:
    """Incomplete ones too; the best is, of those that were evaluated, the one with the lowest validation BCE."""
    found = complete_checkpoints(folder)
    last, best = found[-1], min(found, key=lambda each: each.val_bce)
    was_evaluated = math.isfinite(best.val_bce)
    write_json(folder / INDEX, {"last": last.path.name, "best": best.path.name if was_evaluated else None})
    kept = {each.path for each in found[-KEEP_LAST:]} | ({best.path} if was_evaluated else set())
    for path in [*folder.glob("step_*"), *folder.glob(".step_*")]:
        if path not in kept:
            _remove(path)


def settings_that_matter(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Whatever decides what a training does, in terms that do not depend on the number of ranks; as JSON has it."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_DIFFER}
    settings[ROWS_A_STEP] = config.batch_size * world_size
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings that are not the same, and what they are."""
    names = sorted(saved.keys() | here.keys())
    return [
        f"{name} was {saved.get(name)} and is {here.get(name)}" for name in names if saved.get(name) != here.get(name)
    ]


def _make_empty(path: Path) -> None:
    _remove(path)
    path.mkdir(parents=True)


def _remove(path: Path) -> None:
    """What makes it complete goes first: a half-removed checkpoint must not count."""
    (path / TRAINER).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
