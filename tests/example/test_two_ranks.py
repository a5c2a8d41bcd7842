"""The same run on two ranks: the same start, the same training, every held-out row scored once, one set of files."""

import dataclasses
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from torchrec.datasets.utils import Batch

from cce_torchrec import METHODS
from dlrm_example.cli import parse_config
from dlrm_example.config import TrainConfig
from dlrm_example.records import read_metrics, read_summary
from dlrm_example.trainer import Trainer
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


@pytest.mark.parametrize("method", [key for key, method in METHODS.items() if method.reclusterable])
def test_two_ranks_train_and_recluster(method: str, small_config: Callable[..., TrainConfig], ranks2: RankPool) -> None:
    settings = {"limit_train_batches": None, "batch_size": 5000, "epochs": 1}  # global batches of odd lengths
    config = small_config(method=method, compression=4.0, recluster_count=2, adagrad=True, **settings)
    first, second = ranks2.run(run, config)
    times = {"train_seconds", "recluster_seconds"}
    assert {key: first[key] for key in first.keys() - times} == {key: second[key] for key in second.keys() - times}
    assert first["reclusterings"] == 2
    rows = read_metrics(Path(config.run_dir))
    assert sum(row["event"] == "recluster" for row in rows) == 2, "rows of rank 0 only"


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_like_one_with_twice_the_batch(
    method: str, small_config: Callable[..., TrainConfig], ranks2: RankPool
) -> None:
    """The loss is the mean over the global batch: weights, accumulators and logged losses are those of one rank.

    A batch of 64 rows can be cut evenly; re-clusterings are left out, since they may turn a rounding into another id's row.
    """
    settings = {"method": method, "compression": 1.0 if method == "full" else 4.0, "recluster_count": 0}
    alone, together = small_config("alone", **settings), small_config("together", **settings, batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(0, 1, alone)
    ranks2.run(run, together)
    scores = [
        [(row["split"], row["step"], row["bce"]) for row in read_metrics(Path(config.run_dir))]
        for config in (alone, together)
    ]
    assert len(scores[0]) >= 5
    for one, two in zip(*scores, strict=True):
        assert two[:2] == one[:2]
        assert two[2] == pytest.approx(one[2], abs=2e-5), one


@pytest.mark.parametrize("interaction_type", ["original", "dcn", "projection"])
def test_every_interaction_trains_on_two_ranks_as_on_one(
    interaction_type: str, small_config: Callable[..., TrainConfig], ranks2: RankPool
) -> None:
    """And learns: the training loss of the last of 12 steps is lower than that of the first."""
    layers = {"interaction_branch1_layer_sizes": (16,), "interaction_branch2_layer_sizes": (16,), "dcn_low_rank_dim": 4}
    settings = {
        "interaction_type": interaction_type,
        "method": "cce",
        "compression": 4.0,
        "recluster_count": 0,
        **layers,
    }
    settings |= {"validation_freq_within_epoch": 2, "learning_rate": 0.3}
    alone, together = small_config("alone", **settings), small_config("together", **settings, batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(0, 1, alone)
    ranks2.run(run, together)
    losses = [
        [row["bce"] for row in read_metrics(Path(config.run_dir)) if row["split"] == "train"]
        for config in (alone, together)
    ]
    assert len(losses[0]) == 6
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


class StoppedError(Exception):
    """The run is stopped from outside."""


def run_until(rank: int, world_size: int, config: TrainConfig, last_epoch: int) -> None:
    """Stop the run in the middle of the epoch after the last one."""
    train_step = Trainer._train_step

    def step(trainer: Trainer, batches: Iterator[Batch]) -> None:
        train_step(trainer, batches)
        if trainer._progress.epoch > last_epoch:
            raise StoppedError

    with mock.patch.object(Trainer, "_train_step", step), pytest.raises(StoppedError):
        run(rank, world_size, config)


def test_checkpoints_move_between_numbers_of_ranks(small_config: Callable[..., TrainConfig], ranks2: RankPool) -> None:
    """An epoch each on 1, 2 and 1 ranks, the same 64 rows a step, against 3 epochs on one."""
    settings = {"method": "cce", "compression": 4.0, "recluster_count": 3, "adagrad": True, "epochs": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = run(0, 1, small_config("alone", **settings))
        settings["checkpoint_every_epochs"] = 1
        config = small_config("moving", **settings)
        run_until(0, 1, config, 1)
        ranks2.run(run_until, dataclasses.replace(config, batch_size=32, resume=True), 2)
        moved = run(0, 1, dataclasses.replace(config, resume=True))
    assert (moved["steps"], moved["reclusterings"], moved["world_size"]) == (18, 3, 1)
    rows = read_metrics(Path(config.run_dir))
    assert [row["step"] for row in rows if row.get("split") == "val"] == [6, 12, 18]
    for name in ("best_val_bce", "best_val_auroc", "test_bce", "test_auroc"):
        assert moved[name] == pytest.approx(alone[name], abs=5e-3), name


def error_of(rank: int, world_size: int, config: TrainConfig) -> str:
    try:
        run(rank, world_size, config)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_what_fails_on_one_rank_fails_on_both(small_config: Callable[..., TrainConfig], ranks2: RankPool) -> None:
    """What rank 0 finds in the folder, and a loss that is not finite: no rank waits for another."""
    config = small_config(checkpoint_every_epochs=1, epochs=1)
    assert "no error" in ranks2.run(error_of, config)
    errors = ranks2.run(error_of, config)
    assert errors[0] == errors[1]
    assert "UsageError" in errors[0]
    errors = ranks2.run(error_of, dataclasses.replace(config, resume=True, batch_size=32))
    assert errors[0] == errors[1]
    assert "rows a step (batch_size x ranks) was 128 and is 64" in errors[0]
    errors = ranks2.run(error_of, small_config("diverges", learning_rate=1e30))
    assert errors[0] == errors[1]
    assert "TrainingDivergedError: the training loss is" in errors[0]


JOIN_AND = """
import os, sys, time, torch.distributed as dist
from dlrm_example.distributed import process_group
with process_group(timeout=float(sys.argv[1])) as world:
    dist.barrier()
    if world.rank == world.size - 1:
        exec(sys.argv[2])
    dist.barrier()
"""


@pytest.mark.parametrize(
    ("size", "timeout", "last_rank", "message"),
    [
        (2, "60", "raise ValueError('fails')", "rank 1 ended with ValueError: fails"),
        (3, "4", "time.sleep(14)", "no sign of rank 2 of 3 within 4 s: hung, dead or cut off"),
        (2, "60", "os.kill(os.getpid(), 9)", "no sign of rank 1 of 2 within 10 s: hung, dead or cut off"),
    ],
    ids=["raises", "hangs", "dies"],
)
def test_no_rank_waits_for_one_that_fails_or_hangs(size: int, timeout: str, last_rank: str, message: str) -> None:
    """The others are in a collective that it never joins; nobody stops them but their own process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", JOIN_AND, timeout, last_rank],
            env={**os.environ, **variables, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, error in list(zip(ranks, errors, strict=True))[:-1]:
        assert process.returncode == 1, errors
        assert "RanksLostError" in error
        assert message in error, errors


@pytest.mark.slow
def test_torchrun_shows_what_one_rank_would(tmp_path: Path, data_path: str) -> None:
    """One plan, one table, no warnings, in a run that goes on from one rank's checkpoint, re-clusters and saves its own."""
    flags = f"--method cce --run_dir {tmp_path} --data_path {data_path} --limit_train_batches 2 --epochs 2"
    flags += " --recluster_count 1 --limit_val_batches 1 --limit_test_batches 1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_until(0, 1, parse_config([*flags.split(), "--batch_size", "128"]), 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--batch_size", "64", "--resume", "--print_sharding_plan"]
    command = [*torchrun, "-m", "dlrm_example.train", *flags.split(), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "Warning" not in shown, shown
    for part in (
        *(
            "sharding plan of 2 ranks",
            "sharding type  kernel  ranks",
            "embedding tables",
            "resumed from",
            "best val BCE",
        ),
        *("Re-clustered after step 3", "epoch 2 step 4"),
    ):
        assert shown.count(part) == 1, (part, shown)
    assert read_summary(tmp_path).world_size == 2
