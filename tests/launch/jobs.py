"""Starting jobs as a user does, in processes of their own, and what they leave."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import launch
from dlrm_example.records import read_metrics
from tests.scripts import ROOT

COMPONENTS = Path(launch.__file__).with_name("components.py")
SIZES = "--limit_train_batches 6 --epochs 2 --embedding_dim 8 --dense_arch_layer_sizes 8,8 --over_arch_layer_sizes 8,1"
FLAGS = f"{SIZES} --method cce --compression 4 --adagrad --seed 5 --limit_test_batches 1 --log_every_steps 5".split()
STEPS = 12


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Ours, with this interpreter's torchrun on the path and nothing of a job that the tests themselves may run in."""
    shim = folder / "bin" / "torchrun"
    if not shim.exists():
        shim.parent.mkdir(parents=True)
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m torch.distributed.run "$@"\n')
        shim.chmod(0o755)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "TORCHX", "PET_"))}
    quick = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PET_MONITOR_INTERVAL": "0.1",
        "PYTHONWARNINGS": "ignore",
    }
    return {**ours, **quick, "PATH": f"{shim.parent}:{ours['PATH']}", **variables}


def torchx_run(component: str, *arguments: str, folder: Path, **variables: str) -> list[str]:
    """The command; logs of the job go to the folder."""
    torchx = [sys.executable, "-W", "ignore", "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    return [*torchx, "-cfg", f"log_dir={folder / 'torchx'}", "--workspace", "", f"{COMPONENTS}:{component}", *arguments]


def torchrun(nproc: int, *arguments: str, module: str = "dlrm_example.train", max_restarts: int = 0) -> list[str]:
    """The command, on one node."""
    elastic = ["--standalone", "--nproc_per_node", str(nproc), "--max_restarts", str(max_restarts)]
    return ["torchrun", *elastic, "-m", module, *arguments]


@contextmanager
def started(command: list[str], folder: Path, output: IO[str], **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The process, in a session of its own that ends with the test, whatever happens."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(folder, **variables),
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # TorchX and torchrun end what they have started, which has sessions of its own
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(command: list[str], folder: Path, timeout: float = 90, **variables: str) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.txt"
    with open(log, "w") as output, started(command, folder, output, **variables) as process:
        code = process.wait(timeout=timeout)
    return code, log.read_text()


def scores(run_dir: Path) -> list[tuple[str, int, float]]:
    """Every evaluation of a run: split, step, BCE."""
    rows = [row for row in read_metrics(run_dir) if row["event"] == "eval"]
    return [(row["split"], row["step"], row["bce"]) for row in rows]
