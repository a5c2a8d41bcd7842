"""Training on prepared Parquet, two ranks against one, and on from one to two and back in the middle of an epoch."""

import dataclasses
import warnings
from pathlib import Path

import pytest

from dlrm_example.cli import parse_config
from dlrm_example.config import TrainConfig
from dlrm_example.data import prepare as prepare_module
from dlrm_example.records import read_metrics
from tests.data.rows import COLUMNS, raw_rows, write
from tests.distributed.harness import RankPool
from tests.example.test_resume import steps_of
from tests.example.test_two_ranks import run, run_until

pytestmark = pytest.mark.distributed

FLAGS = "--dataset_name parquet --epochs 2 --global_batch_size 64 --test_batch_size 40 --embedding_dim 8 --adagrad"
FLAGS += " --dense_arch_layer_sizes 8 --over_arch_layer_sizes 8,1 --min_compressed_rows 8 --dense_columns a"
FLAGS += " --sparse_columns u,tags,i --multi_hot_sizes 3,1,1 --limit_train_batches 8 --checkpoint_every_epochs 0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose ids tell the label, in many row groups."""
    root = tmp_path_factory.mktemp("two_ranks")
    rows = raw_rows(800)
    for row in rows:
        row["y"] = int(row["u"] is None or row["u"] % 2 == 0)
    write(root / "raw" / "x.parquet", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ROW_GROUP_ROWS", 50)
        assert prepare_module.main(["--input", str(root / "raw"), "--out", str(root / "prepared"), *COLUMNS]) == 0
    return root / "prepared"


def config(prepared: Path, run_dir: Path, *flags: str) -> TrainConfig:
    return parse_config([*FLAGS.split(), "--data_path", str(prepared), "--run_dir", str(run_dir), *flags])


def alone(config: TrainConfig, last_epoch: int | None = None) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if last_epoch is None:
            return run(0, 1, config)
        run_until(0, 1, config, last_epoch)
        return {}


def losses(config: TrainConfig) -> list[tuple[str, int, float]]:
    return [(row["split"], row["step"], row["bce"]) for row in read_metrics(Path(config.run_dir)) if "split" in row]


@pytest.mark.parametrize("method", ["full", "cce"])
def test_two_ranks_train_like_one(method: str, prepared: Path, tmp_path: Path, ranks2: RankPool) -> None:
    """Re-clusterings are left out, since they may turn a rounding into another id's row."""
    size = [] if method == "full" else ["--compression", "1.5"]
    flags = ["--method", method, *size, "--recluster_count", "0", "--validation_freq_within_epoch", "3"]
    one, two = (config(prepared, tmp_path / name, *flags) for name in ("one", "two"))
    expected = alone(one)
    found = ranks2.run(run, two)
    assert found[0]["world_size"] == 2
    assert expected["samples"] == found[0]["samples"] == 2 * 8 * 64
    assert [row[:2] for row in losses(two)] == [row[:2] for row in losses(one)]
    assert [row[2] for row in losses(two)] == pytest.approx([row[2] for row in losses(one)], abs=2e-5)
    assert len({row[2] for row in losses(one)}) > 6, "it learns"


def test_a_run_moves_between_numbers_of_ranks(prepared: Path, tmp_path: Path, ranks2: RankPool) -> None:
    """From step 5, in epoch 1 of 8 steps, on two ranks, and from step 15, in epoch 2, on one again."""
    flags = ["--method", "cce", "--compression", "1.5", "--recluster_count", "3", "--epochs", "3"]
    undisturbed = config(prepared, tmp_path / "undisturbed", *flags)
    expected = alone(undisturbed)
    moving = config(prepared, tmp_path / "moving", *flags, "--checkpoint_every_steps", "5", "--no-checkpoint_best")
    alone(moving, last_epoch=1)
    assert steps_of(moving) == [5]
    resumed = dataclasses.replace(moving, resume=True)
    ranks2.run(run_until, resumed, 2)
    assert steps_of(moving) == [10, 15]
    found = alone(resumed)
    assert (found["steps"], found["reclusterings"], found["world_size"]) == (24, expected["reclusterings"], 1)
    assert [row[:2] for row in losses(moving) if row[0] == "val"] == [("val", 8), ("val", 16), ("val", 24)]
    for name in ("best_val_bce", "best_val_auroc", "test_bce", "test_auroc"):
        assert found[name] == pytest.approx(expected[name], abs=5e-3), name
