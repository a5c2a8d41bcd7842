"""Binary cross-entropy and AUROC of a model over a split, over all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from dlrm_example.console import progress_bar
from dlrm_example.data import BatchLoader
from dlrm_example.data.dataset import PADDING


@dataclass(frozen=True)
class Scores:
    """`bce` in nats a row; `auroc` is 0 where a split has only one class (torchmetrics' convention)."""

    bce: float
    auroc: float


def evaluate(model: nn.Module, loader: BatchLoader, device: torch.device, *, title: str, progress: bool) -> Scores:
    """Scores over the loader's batches, every row of every rank counted once.

    Args:
        model: maps a batch to (loss, (loss, logits, labels)), as TorchRec's `DLRMTrain` does.
    """
    bce, auroc = MeanMetric().to(device), BinaryAUROC().to(device)
    with _evaluating(model):
        for batch in progress_bar(loader.epoch(0), title, len(loader), progress):
            _, (_, logits_B, labels_B) = model(batch.to(device))
            real_B = labels_B != PADDING
            logits_B, labels_B = logits_B[real_B].double(), labels_B[real_B]
            bce.update(binary_cross_entropy_with_logits(logits_B, labels_B.double(), reduction="none"))
            auroc.update(torch.sigmoid(logits_B), labels_B)
    return Scores(bce=float(bce.compute()), auroc=float(auroc.compute()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
