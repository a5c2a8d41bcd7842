"""Scores and histograms for TensorBoard, in `run_dir/tensorboard`."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from dlrm_example.config import UsageError

MOST_BUCKETS = 64  # of a histogram


class Board:
    """Writes scalars and histograms by step, or nothing where it has no folder."""

    def __init__(self, folder: Path | None, first_step: int) -> None:
        """What an interrupted run wrote from `first_step` on is hidden by what follows."""
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard, which is optional

            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, group: str, step: int, **scores: float | None) -> None:
        if self._writer is None:
            return
        for name, score in scores.items():
            if score is not None:
                self._writer.add_scalar(f"{group}/{name}", score, step)
        self._writer.flush()

    def add_counts(self, name: str, step: int, counts_K: np.ndarray) -> None:
        """A histogram of numbers 0 .. K - 1, of which there are so many each."""
        if self._writer is None:
            return
        numbers_K, total = np.arange(len(counts_K), dtype=np.float64), int(counts_K.sum())
        counts, edges = np.histogram(numbers_K, min(len(counts_K), MOST_BUCKETS), (0, len(counts_K)), weights=counts_K)
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts_K) - 1,
            num=total,
            sum=float(numbers_K @ counts_K),
            sum_squares=float(numbers_K**2 @ counts_K),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise a `UsageError` where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs a package that is not installed: pip install tensorboard")
