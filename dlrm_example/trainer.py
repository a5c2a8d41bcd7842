"""The training loop: steps through TorchRec's pipeline, re-clusterings by schedule, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec import ReclusterSchedule
from dlrm_example.board import Board
from dlrm_example.checkpoints import Checkpoints
from dlrm_example.config import TrainConfig
from dlrm_example.console import progress_bar
from dlrm_example.data import BatchLoader
from dlrm_example.distributed import World, mean_over_ranks
from dlrm_example.metrics import Scores, evaluate
from dlrm_example.progress import Evaluation, Progress
from dlrm_example.records import RunFiles
from dlrm_example.stop import StoppedError, StopRequest
from dlrm_example.windows import Window

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss or the weights are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """Batches by split."""

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader


def evaluation(
    model: DistributedModelParallel, loaders: Loaders, progress: Progress, world: World, *, show_progress: bool
) -> Evaluation:
    """Validation scores of the model as it is, and the test's where validation is better than ever; collective."""

    def scores(split: str, loader: BatchLoader) -> Scores:
        return evaluate(model, loader, world.device, title=split, progress=show_progress)

    best, val = progress.best, scores("val", loaders.val)
    test = scores("test", loaders.test) if best is None or val.bce < best.val.bce else None
    return Evaluation(step=progress.step, epoch=progress.epoch, val=val, test=test)


class Trainer:
    """Trains a sharded model and keeps account of it."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        loaders: Loaders,
        schedule: ReclusterSchedule | None,
        files: RunFiles,
        board: Board,
        config: TrainConfig,
        world: World,
    ) -> None:
        self._model, self._optimizer, self._loaders, self._schedule = model, optimizer, loaders, schedule
        self._files, self._board, self._config, self._world = files, board, config, world
        self._show_progress = config.print_progress and world.is_main
        self._pipeline = TrainPipelineSparseDist(model, optimizer, world.device, execute_all_batches=True)
        self._checkpoints = Checkpoints(config, world)
        self._steps_per_epoch = len(loaders.train)
        self._window = Window(world)
        self._stopping = False

    def fit(self, progress: Progress, stop: StopRequest) -> Progress:
        """Train for all steps that are left.

        Args:
            progress: how far model and optimizer are; goes on from there, also in the middle of an epoch.
            stop: looked at after every step; one rank's request stops all.

        Raises:
            TrainingDivergedError: the loss or the weights became infinite or NaN.
            StoppedError: a stop was requested; there is a checkpoint.
        """
        self._progress, self._stop = progress, stop
        self._model.train()
        while progress.step < self._config.epochs * self._steps_per_epoch:
            finished_epochs, first = divmod(progress.step, self._steps_per_epoch)
            progress.epoch = finished_epochs + 1
            self._train_epoch(self._loaders.train.epoch(progress.epoch, start=first), self._steps_per_epoch - first)
        return progress

    def _train_epoch(self, batches: Iterator[Batch], num_steps: int) -> None:
        title = f"epoch {self._progress.epoch}/{self._config.epochs}"
        for _ in progress_bar(range(num_steps), title, num_steps, self._show_progress):
            self._train_step(batches)
            self._recluster_if_due()
            self._report_if_due()
            self._evaluate_if_due()
            self._save_if_due()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step; the pipeline meanwhile sends the ids of the next batches to their ranks."""
        started = time.perf_counter()
        loss, logits_B, labels_B = self._pipeline.progress(batches)
        seconds = time.perf_counter() - started
        self._progress.train_seconds += seconds
        self._progress.step += 1
        self._progress.samples += len(labels_B) * self._world.size
        mean_loss = self._after_step(loss)
        self._progress.losses_since_evaluation.append(mean_loss)
        self._window.add(mean_loss, logits_B, labels_B, seconds)

    def _after_step(self, loss: torch.Tensor) -> float:
        """The mean over the global batch, of which every rank has an equal share; all ranks raise or stop or none does."""
        asked = float(self._stop.made)
        value, asked_anywhere = mean_over_ranks(torch.stack([loss.detach(), loss.new_tensor(asked)]), self._world)
        self._stopping = asked_anywhere > 0
        if not math.isfinite(value):
            where = f"step {self._progress.step} (epoch {self._progress.epoch})"
            raise TrainingDivergedError(f"the training loss is {value} at {where}; try a smaller --learning_rate")
        return value

    def _recluster_if_due(self) -> None:
        if self._schedule is None:
            return
        started = time.perf_counter()
        try:
            report = self._schedule.step(self._progress.step, self._model, optimizer=self._optimizer)
        except ValueError as error:  # weights that are not finite
            raise TrainingDivergedError(f"re-clustering after step {self._progress.step}: {error}") from None
        if report is None:
            return
        seconds = time.perf_counter() - started
        self._progress.recluster_seconds += seconds
        self._progress.reclusterings += 1
        row = {"event": "recluster", "step": self._progress.step, "epoch": self._progress.epoch, "seconds": seconds}
        self._files.log(**row, tables=[asdict(table) for table in report.tables])
        for table in report.tables:
            scores = {"relative_squared_error": table.relative_squared_error, "moved_fraction": table.moved_fraction}
            self._board.add(f"recluster/{table.table}", self._progress.step, **scores)

    def _report_if_due(self) -> None:
        """One line a window of steps."""
        if self._progress.step % self._config.log_every_steps:
            return
        scores, step = self._window.scores(), self._progress.step
        self._window = Window(self._world)
        self._board.add("window", step, **scores)
        logger.info(
            "step %d/%d: %.0f samples/s, loss %.4f, auroc %.4f, %s",
            *(step, self._config.epochs * self._steps_per_epoch),
            *(scores["samples_per_s"], scores["loss"], scores["auroc"], self._recluster_state()),
        )

    def _recluster_state(self) -> str:
        if self._schedule is None:
            return "no re-clustering"
        left = [step for step in self._schedule.steps if step > self._progress.step]
        coming = f"next after step {left[0]}" if left else "none to come"
        return f"re-clustered {self._progress.reclusterings} times, {coming}"

    def _evaluate_if_due(self) -> None:
        """At the end of an epoch, and within it as often as asked for."""
        every, step = self._config.validation_freq_within_epoch, self._progress.step
        if step % self._steps_per_epoch == 0 or (every is not None and step % every == 0):
            self._evaluate()

    def _save_if_due(self) -> None:
        """The last thing in a step: whatever goes on from the checkpoint begins with the next one."""
        if self._stopping or self._checkpoints.is_due(self._progress.step, self._steps_per_epoch):
            self._checkpoints.save(self._model, self._optimizer, self._progress, self._files.metrics_bytes())
        if self._stopping:
            raise StoppedError(f"stopped after step {self._progress.step}, with a checkpoint")

    def _evaluate(self) -> None:
        """Batches in flight stay in flight."""
        progress = self._progress
        train_bce = sum(progress.losses_since_evaluation) / len(progress.losses_since_evaluation)
        progress.losses_since_evaluation.clear()
        with self._detached_model():
            found = evaluation(self._model, self._loaders, progress, self._world, show_progress=self._show_progress)
        progress.evaluations.append(found)
        self._files.log_evaluation(found, train_bce)
        self._board.add("train", progress.step, bce=train_bce)
        for split, scores in found.by_split().items():
            self._board.add(split, progress.step, bce=scores.bce, auroc=scores.auroc)
        logger.info(
            "epoch %d step %d: train bce %.4f, val bce %.4f, val auroc %.4f%s",
            *(progress.epoch, progress.step, train_bce, found.val.bce, found.val.auroc),
            " (best so far)" if found.test else "",
        )

    @contextmanager
    def _detached_model(self) -> Iterator[None]:
        self._pipeline.detach()
        try:
            yield
        finally:
            # Without `sparse_dist=False`, the batch in flight gets a new context for the ids that were sent with the old
            # one, and rows from before a re-clustering pass for rows from after it.
            self._pipeline.attach(self._model, sparse_dist=False)
