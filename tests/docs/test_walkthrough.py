"""docs/walkthrough.md, followed literally: its commands run one after the other, each in processes of its own.

The run that a later command resumes is stopped by SIGTERM as soon as it has a checkpoint, as the page tells its reader to.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dlrm_example
from dlrm_example.commands import TERMINATED
from dlrm_example.records import read_json, read_metrics, read_summary
from tests.docs.markdown import ROOT, blocks

PAGE = ROOT / "docs" / "walkthrough.md"
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def commands() -> list[list[str]]:
    lines = [line for block in blocks(PAGE, "bash") for line in block.text.splitlines()]
    return [shlex.split(line) for line in lines]


def value_of(command: list[str], flag: str) -> str | None:
    return command[command.index(flag) + 1] if flag in command else None


def run(command: list[str], folder: Path, stop_at: Path | None) -> tuple[int, str]:
    """Its exit code and output; with SIGTERM once there is a checkpoint in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dlrm_example.__path__[0]).parent)}
    program, *arguments = command
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [*PROGRAMS[program], *arguments], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                if stop_at is not None and any(stop_at.glob("checkpoints/step_*")):
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.005)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        return code, output.read()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # takes about a minute where nothing else runs
def test_every_command_of_the_page(tmp_path: Path) -> None:
    script = commands()
    resumed = {value_of(command, "--run_dir") for command in script if "--resume" in command}
    assert len(resumed) == 1
    printed = {}
    for command in script:
        run_dir = value_of(command, "--run_dir")
        stopped = run_dir in resumed and "--resume" not in command
        code, output = run(command, tmp_path, tmp_path / run_dir if stopped and run_dir else None)
        assert code == (TERMINATED if stopped else 0), f"{shlex.join(command)}\n{output}"
        assert "Traceback" not in output
        printed[shlex.join(command)] = output

    walk = tmp_path / "runs" / "walk"
    config = next(text for line, text in printed.items() if "--print_config" in line)
    assert "\nlearning_rate: 0.02\n" in config
    full, first, last = (
        read_summary(walk / "full"),
        *(text for line, text in printed.items() if "--budget_bytes" in line),
    )
    assert "of 3,500,000 bytes on each of 1 devices" in first
    assert "resumed from" in last
    finished = read_summary(walk / "cce")
    assert (full.world_size, finished.world_size) == (1, 2)
    assert finished.steps == full.steps, "no step is lost or doubled"
    reclustered = [row["step"] for row in read_metrics(walk / "cce") if row["event"] == "recluster"]
    assert len(reclustered) == len(set(reclustered)) == finished.reclusterings == 3
    assert finished.embedding_params < full.embedding_params / 4
    table = (walk / "sweep" / "sweep.md").read_text()
    assert all(f"| `{method}` | {size}x |" in table for method in ("cce", "hashing_trick") for size in (4, 16))
    assert f"`full` | 1x | {full.embedding_params:,} |" in table
    assert read_json(walk / "cce" / "config.json")["data_path"] == "runs/walk/prepared"
