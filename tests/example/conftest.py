"""Small settings that training tests share."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlrm_example.config import TrainConfig
from tests.example.archives import data_folder

with warnings.catch_warnings():  # torchmetrics 1.0.3 compares versions by distutils when it is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchmetrics  # noqa: F401

SMALL = {
    "epochs": 2,
    "batch_size": 64,
    "limit_train_batches": 6,
    "embedding_dim": 8,
    "dense_arch_layer_sizes": (8,),
    "over_arch_layer_sizes": (8, 1),
    "seed": 5,
    "checkpoint_every_epochs": 0,
}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Entry points set up logging for their process; here they share one with other tests."""
    loggers = [logging.getLogger(name) for name in (None, "dlrm_example", "cce_torchrec", "torch.fx")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture
def data_path() -> str:
    """The folder of the real data's archive."""
    return data_folder()


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A few steps of a tiny model on the real data."""

    def make(name: str = "run", **changes: object) -> TrainConfig:
        settings = {**SMALL, "run_dir": str(tmp_path / name), "data_path": data_folder(), **changes}
        return TrainConfig(**settings)  # type: ignore[arg-type]

    return make
