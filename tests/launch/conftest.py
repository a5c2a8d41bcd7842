"""What must be imported before warnings are errors, and fixtures of jobs."""

import warnings
from pathlib import Path

import pytest

from tests.example.archives import data_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchmetrics  # noqa: F401
    import torchx.runner
    import torchx.schedulers.aws_batch_scheduler
    import torchx.schedulers.kubernetes_scheduler  # noqa: F401


@pytest.fixture(scope="session")
def data_flags() -> list[str]:
    """Where the training finds the real data's archive."""
    return ["--data_path", data_folder()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a job: its output, its logs, its runs."""
    return tmp_path
