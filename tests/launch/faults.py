"""The example's training on two ranks under TorchElastic, with a fault: `python -m tests.launch.faults FAULT RANK flags`.

What fails is the whole process, at the given rank, and only the first time that TorchElastic starts it. The launcher is
torchrun's own; workers are forks of it, which spares them the seconds that importing torch takes.
"""

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch.distributed.checkpoint.filesystem as dcp_files
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cce_torchrec.recluster import table_work as recluster_work
from dlrm_example.train import main
from dlrm_example.trainer import Trainer

AT_STEP = 8  # checkpoints are saved after steps 3, 6, 9 and 12, and where validation is the best so far


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def after_step(action: Callable[[], None]) -> Any:
    train_step = Trainer._train_step

    def step(trainer: Trainer, batches: Any) -> None:
        train_step(trainer, batches)
        if trainer._progress.step == AT_STEP:
            action()

    return mock.patch.object(Trainer, "_train_step", step)


def on_call(module: Any, name: str, number: int) -> Any:
    """Die when the function is called for so many times."""
    function, calls = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        return function(*args, **kwargs)

    return mock.patch.object(module, name, counted)


def before_showing() -> Any:
    """All is written, `trainer.json` included; only the name is still the hidden one."""
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if path.name == ".step_9":
            die()
        return rename(path, target)

    return mock.patch.object(Path, "rename", renamed)


FAULTS: dict[str, Callable[[], Any]] = {
    "between_steps": lambda: after_step(die),
    "in_reclustering": lambda: on_call(
        recluster_work, "recluster_table", 5
    ),  # in the second one, its second table of 3
    "in_checkpoint": lambda: on_call(dcp_files, "_write_item", 60),
    "before_showing": before_showing,
    "hangs": lambda: after_step(lambda: time.sleep(60)),
}


def worker(fault: str, rank: str, flags: list[str]) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank and fault != "none":
        FAULTS[fault]().start()
    code = main(flags)
    assert code == 0, f"exit code {code}"


if __name__ == "__main__":
    fault, rank, *flags = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0 if fault == "hangs" else 1,
        monitor_interval=0.1,
        start_method="fork",
        shutdown_timeout=1,
    )
    elastic_launch(config, worker)(fault, rank, flags)
