"""The same run on two ranks: the same start, every held-out row scored once, one set of files."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm_example.config import TrainConfig
from dlrm_example.records import read_metrics
from tests.distributed.harness import RankPool

pytestmark = pytest.mark.distributed


def run(rank: int, world_size: int, config: TrainConfig) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dlrm_example.train import train

        return dataclasses.asdict(train(config))


@pytest.mark.parametrize("method", ["full", "hashing_trick", "cce"])
def test_two_ranks_score_a_standing_model_like_one(
    method: str, small_config: Callable[..., TrainConfig], ranks2: RankPool
) -> None:
    """With a learning rate of next to nothing, the model stays what the seed made it."""
    settings = {"method": method, "compression": 1.0 if method == "full" else 4.0, "recluster_count": 0}
    settings |= {"learning_rate": 1e-12, "adagrad": True, "epochs": 1, "test_batch_size": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = run(0, 1, small_config("alone", **settings))
    together = ranks2.run(run, small_config("together", **settings))
    assert together[0]["world_size"] == 2
    assert together[0]["best_val_bce"] == together[1]["best_val_bce"]
    for name in ("best_val_bce", "best_val_auroc", "test_bce", "test_auroc"):
        assert together[0][name] == pytest.approx(alone[name], abs=1e-5), name


def test_two_ranks_train_and_recluster(small_config: Callable[..., TrainConfig], ranks2: RankPool) -> None:
    settings = {"limit_train_batches": None, "batch_size": 5000, "epochs": 1}  # global batches of odd lengths
    config = small_config(method="cce", compression=4.0, recluster_count=2, adagrad=True, **settings)
    first, second = ranks2.run(run, config)
    times = {"train_seconds", "recluster_seconds"}
    assert {key: first[key] for key in first.keys() - times} == {key: second[key] for key in second.keys() - times}
    assert first["reclusterings"] == 2
    rows = read_metrics(Path(config.run_dir))
    assert sum(row["event"] == "recluster" for row in rows) == 2, "rows of rank 0 only"
