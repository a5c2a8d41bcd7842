"""The settings that the quickstart and the MovieLens benchmark share: the same for every method.

They were chosen with `--discard_last 2`, which puts the interactions that are reported on out of sight.
"""

from typing import Any

from dlrm_example.config import TrainConfig, default_compression

SETTINGS: dict[str, Any] = {
    "adagrad": True,
    "learning_rate": 0.05,
    "epochs": 6,
    "recluster_count": 4,
    "checkpoint_every_epochs": 0,
}


def movielens_config(method: str, run_dir: str, **changes: Any) -> TrainConfig:
    """A run of one method on MovieLens-100K, with 8 times fewer embedding parameters unless the method is full."""
    settings = {"compression": default_compression(method), "overwrite": True, **SETTINGS, **changes}
    return TrainConfig(run_dir=run_dir, method=method, **settings)
