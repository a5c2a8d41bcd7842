"""Values that are not finite: every rank stops, the message says where, and no checkpoint has them."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch

from dlrm_example.checkpoints import complete_checkpoints
from dlrm_example.config import TrainConfig
from dlrm_example.data import DATASETS, ColumnChoice, order
from dlrm_example.data import prepare as prepare_module
from dlrm_example.data.manifest import read_manifest
from dlrm_example.data.prepare import main as prepare
from dlrm_example.data.prepared import open_prepared
from dlrm_example.divergence import TrainingDivergedError
from dlrm_example.records import METRICS
from dlrm_example.train import main, train
from dlrm_example.trainer import Trainer
from tests.data.rows import COLUMNS, prepared_rows, raw_rows, write
from tests.distributed.harness import RankPool
from tests.example.test_two_ranks import run

Configs = Callable[..., TrainConfig]
STEPS = 6  # an epoch of small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating:FutureWarning"),
]


def error_of(config: TrainConfig) -> str:
    with pytest.raises(TrainingDivergedError) as caught:
        train(config)
    return str(caught.value)


def saved_steps(config: TrainConfig) -> list[int]:
    return [found.step for found in complete_checkpoints(Path(config.run_dir) / "checkpoints")]


def poison_weight(after: int, rank: int = 0) -> "mock._patch[object]":
    """One weight of the dense layers becomes NaN on one rank, after a step."""
    train_step = Trainer._train_step

    def step(trainer: Trainer, batches: Iterator[Batch]) -> None:
        train_step(trainer, batches)
        if trainer._progress.step == after and trainer._world.rank == rank:
            weight = dict(trainer._model.named_parameters())["model.over_arch.model.1.weight"]
            weight.data.view(-1)[0] = math.nan

    return mock.patch.object(Trainer, "_train_step", step)


POISON, TOO_MUCH = 423, 3e38  # the number of a raw row, and a value whose gradients are infinite in float32


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data in small row groups; one value of one training row is too large."""
    rows = raw_rows(800)
    rows[POISON]["a"] = TOO_MUCH
    write(tmp_path / "raw" / "x.parquet", rows)
    monkeypatch.setattr(prepare_module, "ROW_GROUP_ROWS", 50)
    monkeypatch.setattr(order, "BLOCK_ROWS", 150)
    assert prepare(["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS]) == 0
    return tmp_path / "prepared"


@pytest.mark.parametrize("checked_by", ["losses", "weights"])
def test_a_poisoned_row_is_named_by_its_step_file_and_row_group(
    checked_by: str, poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own loss is large, the next one NaN, unless its weights are looked at before."""
    run_dir = poisoned.parent / "run"
    flags = f"--dataset_name parquet --data_path {poisoned} --run_dir {run_dir} --epochs 2 --batch_size 64"
    flags += " --embedding_dim 8 --dense_arch_layer_sizes 8 --over_arch_layer_sizes 8,1 --dense_columns a --seed 3"
    flags += f" --checkpoint_every_steps {2 if checked_by == 'weights' else 7}"
    assert main(flags.split()) == 1
    error = capsys.readouterr().err

    loader = open_prepared(poisoned, ColumnChoice(dense=("a",))).loader("train", batch_size=64, shuffle_seed=3)
    batches = [bool((batch.dense_features > 1e38).any()) for batch in loader.epoch(1)]
    step = batches.index(True) + 1
    (file,) = read_manifest(poisoned).splits["train"]
    words = rf"the largest loss was \d.*e\+\d\d at step {step} \(epoch 1, batch {step} of {len(batches)}: "
    found = re.search(words + rf"rows of {file.path} \(row group (.*?)\)", error)
    assert found, error
    named = [int(group) for group in found[1].split(", ")]
    place = [row["row"] for row in prepared_rows(poisoned, "train")].index(float(POISON))
    assert int(np.searchsorted(np.cumsum(file.row_groups), place, side="right")) in named
    assert len(named) < len(file.row_groups), "not simply all"
    if checked_by == "losses":
        assert step == 8, "between the checkpoint of step 7 and the next"
        assert "the training loss is nan at step 9 (epoch 1, batch 9" in error
    else:
        assert f"became infinite or NaN in steps {step - 1} to {step}" in error
    last = 7 if checked_by == "losses" else step - 2
    assert f"the last good checkpoint is {run_dir / 'checkpoints' / f'step_{last}'}" in error
    assert not (run_dir / "summary.json").exists()


def test_row_groups_of_every_batch(poisoned: Path) -> None:
    """Those that the words name hold exactly the rows of the batch, on one rank and over two."""
    dataset = open_prepared(poisoned, ColumnChoice(dense=("row",)))
    (file,) = dataset.manifest.splits["train"]
    ends = torch.tensor(file.row_groups).cumsum(0)
    place = {row["row"]: index for index, row in enumerate(prepared_rows(poisoned, "train"))}
    for shuffle_seed in (None, 5):
        settings = {"batch_size": 32, "shuffle_seed": shuffle_seed}
        ranks = [dataset.loader("train", rank=rank, world_size=2, **settings) for rank in range(2)]
        for number, batches in enumerate(zip(*(loader.epoch(2) for loader in ranks), strict=True)):
            rows = torch.cat([batch.dense_features[batch.labels >= 0, 0] for batch in batches])
            groups = torch.bucketize(torch.tensor([place[row] for row in rows.tolist()]), ends, right=True)
            words = ", ".join(map(str, sorted(set(groups.tolist()))))
            assert {loader.position(2, number) for loader in ranks} == {
                f"batch {number + 1} of {len(ranks[0])}: rows of {file.path} (row group {words}) in {poisoned}"
            }


def test_rows_in_memory_are_named(small_config: Configs) -> None:
    config = small_config()
    loader = DATASETS[config.dataset_name](config.data_path).loader("train", batch_size=3, shuffle_seed=4)
    split = DATASETS[config.dataset_name](config.data_path).loader("train", batch_size=10**6)
    (whole,) = split.epoch(0)
    words = loader.position(2, 5)
    rows = [int(row) for row in words.split("rows ")[1].split(" of")[0].split(", ")]
    batch = next(loader.epoch(2, start=5))
    assert words.startswith(f"batch 6 of {len(loader)}: ")
    torch.testing.assert_close(whole.dense_features[rows], batch.dense_features)


def test_a_large_learning_rate(small_config: Configs) -> None:
    """A loss that is not finite is found before the next checkpoint is saved."""
    config = small_config(learning_rate=1e30, checkpoint_every_steps=1, embedding_optimizer="sgd")
    error = error_of(config)
    step = int(error.split("at step ")[1].split(" ")[0])
    assert "the training loss is " in error
    assert saved_steps(config) == list(range(max(step - 2, 1), step))


def test_weights_that_are_not_finite_are_not_saved(small_config: Configs) -> None:
    """Though no loss has told of them yet: they became so in the step before the save."""
    config = small_config(checkpoint_every_steps=2)
    with poison_weight(after=4):
        error = error_of(config)
    assert "model.model.over_arch.model.1.weight became infinite or NaN in steps 3 to 4" in error
    assert f"the last good checkpoint is {Path(config.run_dir) / 'checkpoints' / 'step_2'}" in error
    assert saved_steps(config) == [2]
    assert train(dataclasses.replace(config, resume=True)).steps == 2 * STEPS


def test_weights_that_are_not_finite_are_not_reclustered(small_config: Configs) -> None:
    config = small_config(method="cce", compression=4.0, recluster_count=2, log_every_steps=1)
    with poison_weight(after=4):
        error = error_of(config)
    assert "over_arch.model.1.weight became infinite or NaN in steps 1 to 4" in error
    assert "the last good checkpoint is none" in error


def test_an_evaluation_of_weights_that_are_not_finite(small_config: Configs) -> None:
    config = small_config(checkpoint_every_epochs=1)
    with poison_weight(after=2 * STEPS):
        error = error_of(config)
    assert f"the validation loss is nan after steps {STEPS + 1} to {2 * STEPS}" in error
    rows = [json.loads(line) for line in (Path(config.run_dir) / METRICS).read_text().splitlines()]
    assert {row["step"] for row in rows} == {STEPS}
    assert saved_steps(config) == [STEPS]


def poisoned_on_rank_1(rank: int, world_size: int, config: TrainConfig, after: int) -> str:
    with poison_weight(after, rank=1):
        try:
            run(rank, world_size, config)
        except TrainingDivergedError as error:
            return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("after", "message"), [(4, "1.weight became infinite or NaN in steps 3 to 4"), (5, "at step 6")]
)
def test_one_rank_s_values_stop_both(after: int, message: str, small_config: Configs, ranks2: RankPool) -> None:
    config = small_config(checkpoint_every_steps=2, batch_size=32)
    first, second = ranks2.run(poisoned_on_rank_1, config, after)
    assert first == second
    assert message in first
    assert saved_steps(config)[-1] == {4: 2, 5: 4}[after]


def test_losses_are_not_looked_at_in_every_step(small_config: Configs) -> None:
    """Looking waits for the device: at lines of the log and at evaluations, re-clusterings and checkpoints only."""
    looked: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> object:
        if tensor.requires_grad is False and tensor.dim() == 1 and tensor.dtype == torch.float32:
            looked.append(len(tensor))
        return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", counted), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(small_config(epochs=1, log_every_steps=4))
    assert looked == [4, 2]
