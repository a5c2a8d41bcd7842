"""The settings that the quickstart and the MovieLens benchmark share, the same for every method: a preset's."""

from typing import Any

from dlrm_example.config import TrainConfig, default_compression
from dlrm_example.preset_files import read_preset

SETTINGS: dict[str, Any] = {**read_preset("movielens_100k"), "checkpoint_every_epochs": 0}


def movielens_config(method: str, run_dir: str, **changes: Any) -> TrainConfig:
    """A run of one method on MovieLens-100K, with 8 times fewer embedding parameters unless the method is full."""
    settings = {"compression": default_compression(method), "overwrite": True, **SETTINGS, **changes}
    return TrainConfig(run_dir=run_dir, method=method, **settings)
