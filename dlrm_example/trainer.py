"""The training loop: steps through TorchRec's pipeline, re-clusterings by schedule, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

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
from dlrm_example.distributed import World
from dlrm_example.divergence import Watch
from dlrm_example.lr_schedule import LearningRateSchedule
from dlrm_example.metrics import Scores, evaluate
from dlrm_example.progress import Evaluation, Progress
from dlrm_example.reclustering import record_reclustering
from dlrm_example.records import RunFiles
from dlrm_example.stop import StoppedError, StopRequest, StopVote
from dlrm_example.windows import Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """Batches by split."""

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader


def evaluation(
    model: DistributedModelParallel,
    loaders: Loaders,
    progress: Progress,
    world: World,
    wants_test: Callable[[Scores], bool],
    *,
    show_progress: bool = False,
) -> Evaluation:
    """Validation scores of the model as it is, and the test's where the former ask for it; collective."""

    def scores(split: str, loader: BatchLoader) -> Scores:
        return evaluate(model, loader, world.device, title=split, progress=show_progress)

    val = scores("val", loaders.val)
    test = scores("test", loaders.test) if wants_test(val) else None
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
        self._num_steps = config.epochs * self._steps_per_epoch
        self._learning_rate = LearningRateSchedule.of(config)
        self._window = Window(world)
        self._stopping = False

    def fit(self, progress: Progress, stop: StopRequest) -> Progress:
        """Train for all steps that are left.

        Args:
            progress: how far model and optimizer are; goes on from there, also in the middle of an epoch.
            stop: looked at after every step; one rank's request stops all.

        Raises:
            TrainingDivergedError: the loss or the weights became infinite or NaN.
            CheckpointFailedError: a checkpoint could not be written.
            StoppedError: a stop was requested; there is a checkpoint.
        """
        self._progress = progress
        self._watch = Watch(self._loaders.train, self._checkpoints, progress.step, self._world)
        self._stop = StopVote(stop, self._world, self._config.collective_timeout)
        self._model.train()
        while not self._is_done():
            finished_epochs, first = divmod(progress.step, self._steps_per_epoch)
            progress.epoch = finished_epochs + 1
            self._train_epoch(self._loaders.train.epoch(progress.epoch, start=first), self._steps_per_epoch - first)
        return progress

    def _is_done(self) -> bool:
        return (
            self._progress.step == self._num_steps or self._progress.step_of(self._config.validation_auroc) is not None
        )

    def _train_epoch(self, batches: Iterator[Batch], num_steps: int) -> None:
        title = f"epoch {self._progress.epoch}/{self._config.epochs}"
        for _ in progress_bar(range(num_steps), title, num_steps, self._show_progress):
            self._train_step(batches)
            self._recluster_if_due()
            self._report_if_due()
            self._evaluate_if_due()
            self._save_if_due()
            if self._is_done():
                break

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step; the pipeline meanwhile sends the ids of the next batches to their ranks."""
        with self._training_time():
            self._learning_rate.apply(self._optimizer, self._progress.step + 1)
            loss, logits_B, labels_B = self._pipeline.progress(batches)
        self._progress.step += 1
        self._progress.samples += len(labels_B) * self._world.size
        self._watch.add(loss)
        self._window.add(logits_B, labels_B)
        self._stopping = self._stop.passed()

    def _take_losses(self) -> None:
        """Of all steps so far, into the accounts; all ranks stop at the first that is not finite."""
        with self._training_time():  # what the device has yet to do
            losses = self._watch.take_losses()
        self._progress.losses_since_evaluation.extend(losses)
        self._window.losses.extend(losses)

    @contextmanager
    def _training_time(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._progress.train_seconds += seconds
        self._window.seconds += seconds

    def _recluster_if_due(self) -> None:
        if self._schedule is None:
            return
        if self._schedule.is_due(self._progress.step):
            self._take_losses()
            self._watch.check_weights(self._model, self._optimizer)
        try:
            report = self._schedule.step(self._progress.step, self._model, optimizer=self._optimizer)
        except ValueError as error:  # vectors that are not finite, though weights are
            raise self._watch.diverged(f"re-clustering after step {self._progress.step}: {error}") from None
        if report is not None:
            record_reclustering(report, self._progress, self._model, self._files, self._board)

    def _report_if_due(self) -> None:
        """One line a window of steps."""
        if self._progress.step % self._config.log_every_steps:
            return
        self._take_losses()
        scores, step = self._window.scores(), self._progress.step
        self._window = Window(self._world)
        self._board.add("window", step, **scores, learning_rate=self._learning_rate.at(step))
        logger.info(
            "step %d/%d: %.0f samples/s, loss %.4f, auroc %.4f, learning rate %.4g, %s",
            *(step, self._num_steps, scores["samples_per_s"], scores["loss"], scores["auroc"]),
            *(self._learning_rate.at(step), self._recluster_state()),
        )

    def _recluster_state(self) -> str:
        if self._schedule is None:
            return "no re-clustering"
        left = [step for step in self._schedule.steps if step > self._progress.step]
        coming = f"next after step {left[0]}" if left else "none to come"
        return f"re-clustered {self._progress.reclusterings} times, {coming}"

    def _evaluate_if_due(self) -> None:
        """At the end of training, of every epoch, and within it, as often as asked for."""
        every, step = self._config.validation_freq_within_epoch, self._progress.step
        ends_epoch = step % self._steps_per_epoch == 0 and self._config.evaluate_on_epoch_end
        if step == self._num_steps or ends_epoch or (every is not None and step % every == 0):
            self._evaluate()

    def _save_if_due(self) -> None:
        """The last thing in a step: whatever goes on from the checkpoint begins with the next one."""
        if self._stopping or self._checkpoints.is_due(self._progress, self._steps_per_epoch):
            self._take_losses()
            self._watch.check_weights(self._model, self._optimizer)
            self._checkpoints.save(self._model, self._optimizer, self._progress, self._files.metrics_bytes())
        if self._stopping:
            raise StoppedError(f"stopped after step {self._progress.step}, with a checkpoint")

    def _wants_test(self, val: Scores) -> bool:
        if not self._config.evaluate_on_training_end:
            return self._progress.improves(val)
        target = self._config.validation_auroc
        return self._progress.step == self._num_steps or (target is not None and val.auroc >= target)

    def _evaluate(self) -> None:
        """Batches in flight stay in flight."""
        self._take_losses()
        progress = self._progress
        train_bce = sum(progress.losses_since_evaluation) / len(progress.losses_since_evaluation)
        progress.losses_since_evaluation.clear()
        with self._detached_model():
            found = evaluation(
                *(self._model, self._loaders, progress, self._world, self._wants_test),
                show_progress=self._show_progress,
            )
        if not math.isfinite(found.val.bce):
            raise self._watch.diverged(f"the validation loss is {found.val.bce} after {self._watch.steps_to_blame}")
        progress.evaluations.append(found)
        self._files.log_evaluation(found, train_bce)
        self._board.add("train", progress.step, bce=train_bce)
        for split, scores in found.by_split().items():
            self._board.add(split, progress.step, **asdict(scores))
        logger.info(
            "epoch %d step %d: train bce %.4f, val bce %.4f, val auroc %.4f, val ne %.4f, val calibration %.4f%s",
            *(progress.epoch, progress.step, train_bce),
            *(found.val.bce, found.val.auroc, found.val.ne, found.val.calibration),
            " (best so far)" if progress.is_best else "",
        )
        if progress.step_of(self._config.validation_auroc) is not None:
            logger.info("reached --validation_auroc %g at step %d", self._config.validation_auroc, progress.step)

    @contextmanager
    def _detached_model(self) -> Iterator[None]:
        self._pipeline.detach()
        try:
            yield
        finally:
            # Without `sparse_dist=False`, the batch in flight gets a new context for the ids that were sent with the old
            # one, and rows from before a re-clustering pass for rows from after it.
            self._pipeline.attach(self._model, sparse_dist=False)
