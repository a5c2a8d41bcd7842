"""Workers that are killed or hang: the job goes on from its last complete checkpoint, and ends as if nothing had happened."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dlrm_example.records import Summary, read_metrics, read_summary
from tests.launch.jobs import FLAGS, STEPS, run, scores

pytestmark = pytest.mark.distributed

JOB = [
    *(*FLAGS, "--recluster_count", "3", "--global_batch_size", "128"),
    *("--checkpoint_every_steps", "3", "--validation_freq_within_epoch", "4", "--collective_timeout", "60"),
]
TIMES = {"train_seconds", "recluster_seconds"}


@dataclass
class Job:
    code: int
    output: str
    run_dir: Path

    @property
    def summary(self) -> Summary:
        return read_summary(self.run_dir)


def job(folder: Path, fault: str, rank: int, *flags: str) -> Job:
    """Two ranks under TorchElastic, which starts them again once."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.launch.faults", fault, str(rank), *JOB, *flags]
    return Job(*run([*command, "--run_dir", str(folder / "run")], folder, timeout=150), folder / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Job:
    done = job(tmp_path_factory.mktemp("undisturbed"), "none", 0, *data_flags)
    assert done.code == 0, done.output
    assert "resumed from" not in done.output
    return done


@pytest.mark.parametrize(
    ("fault", "rank", "last_checkpoint"),
    [  # every three steps, and after 4, 6 and 8, where validation is the best so far
        ("between_steps", 1, 6),
        ("between_steps", 0, 6),
        ("in_reclustering", 1, 4),
        ("in_checkpoint", 1, 3),
        ("before_showing", 0, 8),
    ],
)
def test_a_killed_worker_changes_nothing(
    fault: str, rank: int, last_checkpoint: int, undisturbed: Job, data_flags: list[str], folder: Path
) -> None:
    """Bit by bit: a step's sums have two terms, whose order does not matter."""
    done = job(folder, fault, rank, *data_flags)
    assert done.code == 0, done.output
    assert "exitcode: -9" in done.output, "the worker was not killed"
    assert done.output.count(f"resumed from {done.run_dir}/checkpoints/step_{last_checkpoint} ") == 1, done.output
    ours, theirs = vars(done.summary), vars(undisturbed.summary)
    assert {name: ours[name] for name in ours.keys() - TIMES} == {name: theirs[name] for name in ours.keys() - TIMES}
    assert (ours["steps"], ours["samples"], ours["reclusterings"]) == (STEPS, theirs["samples"], 3)
    assert scores(done.run_dir) == scores(undisturbed.run_dir)
    assert [row["step"] for row in read_metrics(done.run_dir) if row["event"] == "recluster"] == [3, 6, 9]
    left = sorted(path.name for path in (done.run_dir / "checkpoints").iterdir())
    assert not [name for name in left if name.startswith(".")], "what was half-written is gone"


def test_a_hung_rank_is_named(data_flags: list[str], folder: Path) -> None:
    done = job(folder, "hangs", 1, *data_flags, "--collective_timeout", "4")
    assert done.code == 1
    assert "error: rank 0: a collective failed" in done.output, done.output
    assert "no sign of rank 1 of 2 within 4 s: hung, dead or cut off" in done.output
    assert not (done.run_dir / "summary.json").exists()


def test_every_rank_has_a_log(undisturbed: Job) -> None:
    logs = {path.name: path.read_text() for path in (undisturbed.run_dir / "logs").iterdir()}
    assert sorted(logs) == ["rank_0.log", "rank_1.log"]
    for rank, text in enumerate(logs[name] for name in sorted(logs)):
        assert f"rank {rank} of 2 is process" in text
        assert f"step 10/{STEPS}: " in text


def test_one_line_a_window_from_rank_0(undisturbed: Job) -> None:
    lines = [line for line in undisturbed.output.splitlines() if "samples/s" in line]
    assert len(lines) == 2
    assert f"step 5/{STEPS}: " in lines[0]
    assert "re-clustered 1 times, next after step 6" in lines[0]
    assert "re-clustered 3 times, none to come" in lines[1]
    assert all(part in lines[0] for part in ("loss 0.", "auroc 0."))
