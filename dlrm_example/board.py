"""Scores for TensorBoard, in `run_dir/tensorboard`."""

import importlib.util
from pathlib import Path
from typing import Any

from dlrm_example.config import UsageError


class Board:
    """Writes scalars by step, or nothing where it has no folder."""

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

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise a `UsageError` where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs a package that is not installed: pip install tensorboard")
