"""Scores of a model over a split, over all ranks, by torchrec.metrics and torchmetrics."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torchmetrics.classification import BinaryAUROC
from torchrec.metrics.calibration import CalibrationMetricComputation
from torchrec.metrics.metrics_namespace import MetricName, MetricPrefix
from torchrec.metrics.ne import NEMetricComputation
from torchrec.metrics.rec_metric import RecMetricComputation

from dlrm_example.console import progress_bar
from dlrm_example.data import BatchLoader
from dlrm_example.data.dataset import PADDING


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model is worth on a split.

    Attributes:
        bce: log loss in nats a row.
        auroc: 0 where a split has only one class (torchmetrics' convention).
        ne: normalised entropy: the log loss over that of the constant that predicts the split's mean label.
        calibration: sum of predictions over sum of labels; 0 where there are no positive labels (torchrec's convention).
    """

    bce: float
    auroc: float
    ne: float
    calibration: float


class RunningScores:
    """Scores of predictions that come in batches; every rank updates with its own, and `compute` is of all of them."""

    def __init__(self, device: torch.device) -> None:
        self._auroc = BinaryAUROC().to(device)
        shape = {"my_rank": 0, "batch_size": 1, "n_tasks": 1, "window_size": 1, "compute_on_all_ranks": True}
        self._entropy = NEMetricComputation(**shape, include_logloss=True).to(device)
        self._calibration = CalibrationMetricComputation(**shape).to(device)

    def update(self, logits_B: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Rows labelled `PADDING` are left out."""
        real_B = labels_B != PADDING
        predictions_B, labels_B = torch.sigmoid(logits_B[real_B].double()), labels_B[real_B]
        self._auroc.update(predictions_B, labels_B)
        one_task = {"predictions": predictions_B[None], "labels": labels_B[None].double()}
        for metric in (self._entropy, self._calibration):
            metric.update(**one_task, weights=torch.ones_like(predictions_B)[None])

    def compute(self) -> Scores:
        """Collective."""
        entropy = _lifetime(self._entropy)
        return Scores(
            bce=entropy[MetricName.LOG_LOSS] * math.log(2),  # torchrec counts in bits
            auroc=float(self._auroc.compute()),
            ne=entropy[MetricName.NE],
            calibration=_lifetime(self._calibration)[MetricName.CALIBRATION],
        )


def _lifetime(metric: RecMetricComputation) -> dict[object, float]:
    """Over all updates, by name, as opposed to those of torchrec's windows."""
    return {each.name: float(each.value) for each in metric.compute() if each.metric_prefix == MetricPrefix.LIFETIME}


def evaluate(model: nn.Module, loader: BatchLoader, device: torch.device, *, title: str, progress: bool) -> Scores:
    """Scores over the loader's batches, every row of every rank counted once.

    Args:
        model: maps a batch to (loss, (loss, logits, labels)), as TorchRec's `DLRMTrain` does.
    """
    scores = RunningScores(device)
    with _evaluating(model):
        for batch in progress_bar(loader.epoch(0), title, len(loader), progress):
            _, (_, logits_B, labels_B) = model(batch.to(device))
            scores.update(logits_B, labels_B)
    return scores.compute()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
