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
from dlrm_example.checkpoints import Checkpoints
from dlrm_example.config import TrainConfig
from dlrm_example.console import progress_bar
from dlrm_example.data import BatchLoader
from dlrm_example.distributed import World, mean_over_ranks
from dlrm_example.metrics import Scores, evaluate
from dlrm_example.progress import Evaluation, Progress
from dlrm_example.records import RunFiles

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss or the weights are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """Batches by split."""

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader


class Trainer:
    """Trains a sharded model and keeps account of it."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        loaders: Loaders,
        schedule: ReclusterSchedule | None,
        files: RunFiles,
        config: TrainConfig,
        world: World,
    ) -> None:
        self._model, self._optimizer, self._loaders, self._schedule = model, optimizer, loaders, schedule
        self._files, self._config, self._world = files, config, world
        self._show_progress = config.print_progress and world.is_main
        self._pipeline = TrainPipelineSparseDist(model, optimizer, world.device, execute_all_batches=True)
        self._checkpoints = Checkpoints(config, world)

    def fit(self, progress: Progress) -> Progress:
        """Train for all epochs that are left.

        Args:
            progress: how far model and optimizer are; goes on from there.

        Raises:
            TrainingDivergedError: the loss or the weights became infinite or NaN.
        """
        self._progress = progress
        self._model.train()
        for epoch in range(progress.epoch + 1, self._config.epochs + 1):
            self._progress.epoch = epoch
            self._train_epoch(self._loaders.train.epoch(epoch))
            if self._progress.losses_since_evaluation:
                self._evaluate()
            if self._checkpoints.is_due(epoch):
                self._checkpoints.save(self._model, self._optimizer, progress, self._files.metrics_bytes())
        return progress

    def _train_epoch(self, batches: Iterator[Batch]) -> None:
        every, num_steps = self._config.validation_freq_within_epoch, len(self._loaders.train)
        title = f"epoch {self._progress.epoch}/{self._config.epochs}"
        for _ in progress_bar(range(num_steps), title, num_steps, self._show_progress):
            self._train_step(batches)
            self._recluster_if_due()
            if every is not None and self._progress.step % every == 0:
                self._evaluate()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step; the pipeline meanwhile sends the ids of the next batches to their ranks."""
        started = time.perf_counter()
        loss, _, _ = self._pipeline.progress(batches)
        self._progress.train_seconds += time.perf_counter() - started
        self._progress.step += 1
        self._progress.losses_since_evaluation.append(self._finite(loss))

    def _finite(self, loss: torch.Tensor) -> float:
        """The mean over the global batch, of which every rank has an equal share; all ranks raise or none does."""
        value = mean_over_ranks(loss, self._world)
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

    def _evaluate(self) -> None:
        """Validation scores, and the test's where validation is better than ever; batches in flight stay in flight."""
        progress, best = self._progress, self._progress.best
        train_bce = sum(progress.losses_since_evaluation) / len(progress.losses_since_evaluation)
        progress.losses_since_evaluation.clear()
        with self._detached_model():
            val = self._scores("val")
            test = self._scores("test") if best is None or val.bce < best.val.bce else None
        progress.evaluations.append(Evaluation(step=progress.step, epoch=progress.epoch, val=val, test=test))
        self._record("train", train_bce, None)
        self._record("val", val.bce, val.auroc)
        if test is not None:
            self._record("test", test.bce, test.auroc)
        logger.info(
            "epoch %d step %d: train bce %.4f, val bce %.4f, val auroc %.4f%s",
            *(progress.epoch, progress.step, train_bce, val.bce, val.auroc, " (best so far)" if test else ""),
        )

    def _scores(self, split: str) -> Scores:
        loader = getattr(self._loaders, split)
        return evaluate(self._model, loader, self._world.device, title=split, progress=self._show_progress)

    def _record(self, split: str, bce: float, auroc: float | None) -> None:
        row = {"event": "eval", "split": split, "step": self._progress.step, "epoch": self._progress.epoch}
        self._files.log(**row, bce=bce, auroc=auroc)

    @contextmanager
    def _detached_model(self) -> Iterator[None]:
        self._pipeline.detach()
        try:
            yield
        finally:
            # Without `sparse_dist=False`, the batch in flight gets a new context for the ids that were sent with the old
            # one, and rows from before a re-clustering pass for rows from after it.
            self._pipeline.attach(self._model, sparse_dist=False)
