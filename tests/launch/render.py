"""Jobs as schedulers would get them, without any scheduler; `python -m tests.launch.render` writes the snapshots anew.

Read the difference before you commit it: the snapshots are what nobody here can try on a real cluster.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from tests.launch.jobs import COMPONENTS

SNAPSHOTS = Path(__file__).with_name("snapshots")
RUNS = """# name: flags
full: --method full
cce-8x: --method cce --compression 8 --method_options num_columns=4
"""
SCHEDULERS: dict[str, dict[str, Any]] = {
    "slurm": {"partition": "training", "time": "04:00:00"},
    "kubernetes": {"queue": "training", "namespace": "ml", "image_repo": "registry.example/dlrm"},
    "aws_batch": {"queue": "training", "user": "someone", "image_repo": "registry.example/dlrm"},
}
IMAGE = ["--image", "registry.example/dlrm:1", "--env", "NCCL_SOCKET_IFNAME=eth0"]
JOBS: dict[str, tuple[list[str], list[str]]] = {
    "dlrm": (
        [*IMAGE, "-j", "2x8", "--cpu", "64", "--gpu", "8", "--memMB", "512000", "--max_retries", "2"],
        [
            "--method",
            "cce",
            "--global_batch_size",
            "65536",
            "--checkpoint_every_steps",
            "1000",
            "--run_dir",
            "/shared/run",
        ],
    ),
    "sweep": ([*IMAGE, "-j", "1x2", "--run_dir", "/shared/sweep"], ["--adagrad", "--epochs", "3"]),
    "prepare": (
        [*IMAGE, "--cpu", "16"],
        ["--format", "criteo_kaggle", "--input", "/shared/train.txt", "--out", "/shared/kaggle"],
    ),
    "recluster_job": ([*IMAGE, "-j", "1x4"], ["--run_dir", "/shared/run", "--output_dir", "/shared/again"]),
}
KEPT = [
    *(("dlrm", scheduler) for scheduler in SCHEDULERS),
    ("sweep", "kubernetes"),
    ("recluster_job", "slurm"),
    ("prepare", "slurm"),
]


def dryrun(component: str, scheduler: str, options: list[str], flags: list[str], cfg: dict[str, Any]) -> Any:
    """TorchX's own dry run of a component of ours."""
    from torchx.runner import get_runner

    with get_runner() as runner:
        return runner.dryrun_component(f"{COMPONENTS}:{component}", [*options, "--", *flags], scheduler, cfg)


def rendered(component: str, scheduler: str) -> str:
    """The job of the snapshot; what TorchX makes up afresh each time has a fixed name."""
    options, flags = JOBS[component]
    with tempfile.TemporaryDirectory() as folder:
        if component == "sweep":
            file = Path(folder) / "runs.txt"
            file.write_text(RUNS)
            options = [*options, "--runs", str(file)]
        info = dryrun(component, scheduler, options, flags, SCHEDULERS[scheduler])
    name = component.removesuffix("_job")
    return re.sub(rf"\b{name}-[a-z0-9]{{10,}}", f"{name}-UNIQUE", str(info)).strip() + "\n"


def snapshot(component: str, scheduler: str) -> Path:
    return SNAPSHOTS / f"{component}.{scheduler}.txt"


if __name__ == "__main__":
    for pair in KEPT:
        snapshot(*pair).write_text(rendered(*pair))
