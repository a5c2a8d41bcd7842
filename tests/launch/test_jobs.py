"""Whole jobs through `torchx run -s local_cwd` and torchrun, in processes of their own, as a user starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_example.cli import parse_config
from dlrm_example.records import Summary, read_config, read_metrics, read_summary
from dlrm_example.train import train
from tests.launch.jobs import FLAGS, STEPS, environment, free_port, run, scores, started, torchrun, torchx_run
from tests.scripts import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RECLUSTER_ONCE = ["--recluster_count", "1", "--recluster_stop_after", "0.5"]  # after step 6 of 12
JOB = [*FLAGS, *RECLUSTER_ONCE, "--global_batch_size", "128", "--validation_freq_within_epoch", "3"]


def one_process(*flags: str) -> Summary:
    """The run that a job is compared with, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(parse_config([*flags, "--no-print_progress"]))


def check_like_one_process(run_dir: Path, data_flags: list[str], tmp_path: Path) -> None:
    """Equal up to rounding until the re-clustering, which may turn a rounding into another id's row; near after it."""
    alone = one_process(*JOB, *data_flags, "--run_dir", str(tmp_path / "alone"))
    summary = read_summary(run_dir)
    assert (summary.steps, summary.samples, summary.reclusterings) == (alone.steps, alone.samples, 1)
    for ours, theirs in zip(scores(run_dir), scores(tmp_path / "alone"), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=2e-5 if ours[1] <= 6 else 5e-3), ours
    assert summary.best_val_bce == pytest.approx(alone.best_val_bce, abs=5e-3)


def test_two_nodes(data_flags: list[str], folder: Path) -> None:
    """Two agents, a rendezvous, a rank each: they train, re-cluster together, save, and end where one process does."""
    options = ["-j", "2x1", "--rdzv_port", str(free_port())]
    flags = [*JOB, *data_flags, "--checkpoint_every_steps", "5", "--run_dir", str(folder / "run")]
    code, output = run(torchx_run("dlrm", *options, "--", *flags, folder=folder), folder, timeout=150)
    assert code == 0, output
    assert read_summary(folder / "run").world_size == 2
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} >= {"step_10", "step_12"}
    assert {path.name for path in (folder / "run" / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    check_like_one_process(folder / "run", data_flags, folder)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the job ended before"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def process_of_rank(run_dir: Path, rank: int) -> int:
    (number,) = re.findall(r"is process (\d+) on", (run_dir / "logs" / f"rank_{rank}.log").read_text())
    return int(number)


def long_job(data_flags: list[str], run_dir: Path, *flags: str) -> list[str]:
    """600 steps, some seconds, in which a checkpoint can be waited for."""
    settings = FLAGS[2:]  # without --limit_train_batches
    sizes = ["--limit_train_batches", "300", "--global_batch_size", "32", "--checkpoint_every_steps", "50"]
    return [*settings, *sizes, "--recluster_count", "0", *data_flags, "--run_dir", str(run_dir), *flags]


def test_a_node_loses_its_worker(data_flags: list[str], folder: Path) -> None:
    """Both agents start their processes again, though only one has seen a failure of its own."""
    run_dir = folder / "run"
    options = ["-j", "2x1", "--rdzv_port", str(free_port()), "--rdzv_conf", "last_call_timeout=1"]
    command = torchx_run("dlrm", *options, "--", *long_job(data_flags, run_dir), folder=folder)
    log = folder / "output.txt"
    with open(log, "w") as output, started(command, folder, output) as process:
        wait_for(run_dir / "checkpoints" / "step_100", process)
        os.kill(process_of_rank(run_dir, 1), signal.SIGKILL)
        code = process.wait(timeout=150)
    shown = log.read_text()
    assert code == 0, shown
    assert shown.count("resumed from") == 1, shown
    alone = one_process(*long_job(data_flags, folder / "alone"))
    summary = read_summary(run_dir)
    assert (summary.steps, summary.samples) == (alone.steps, alone.samples) == (600, 600 * 32)
    assert summary.best_val_bce == pytest.approx(alone.best_val_bce, abs=1e-4)


def test_sigterm_saves_and_another_number_of_workers_goes_on(data_flags: list[str], folder: Path) -> None:
    """1 -> 2 -> 1 workers, each stopped in the middle of an epoch; the processes exit with 143."""
    run_dir = folder / "run"
    for number, workers in enumerate((1, 2)):
        command = torchrun(workers, *long_job(data_flags, run_dir, *(["--resume"] if number else [])))
        log = folder / f"output_{number}.txt"
        before = {path.name for path in (run_dir / "checkpoints").glob("step_*")}
        with open(log, "w") as output, started(command, folder, output) as process:
            first_new = run_dir / "checkpoints" / f"step_{(number + 1) * 150}"
            wait_for(first_new, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) != 0
        (stopped,) = re.findall(r"stopped after step (\d+), with a checkpoint", log.read_text())
        assert (run_dir / "checkpoints" / f"step_{stopped}").exists()
        assert f"step_{stopped}" not in before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = train(parse_config([*long_job(data_flags, run_dir, "--resume"), "--no-print_progress"]))
    alone = one_process(*long_job(data_flags, folder / "alone"))
    assert (ended.steps, ended.samples, ended.world_size) == (alone.steps, alone.samples, 1)
    assert ended.best_val_bce == pytest.approx(alone.best_val_bce, abs=1e-4)


def test_sweep_trains_every_run(data_flags: list[str], folder: Path) -> None:
    (folder / "runs").write_text("full: --method full --compression 1\nqr: --method qr  # with its defaults\n")
    shared = [flag for flag in FLAGS if flag not in ("--method", "cce", "--compression", "4")]
    options = ["--runs", str(folder / "runs"), "--run_dir", str(folder / "sweep")]
    command = torchx_run("sweep", *options, "--", *shared, *data_flags, "--batch_size", "128", folder=folder)
    code, output = run(command, folder, timeout=150)
    assert code == 0, output
    runs = {path.name: read_summary(path) for path in (folder / "sweep").iterdir()}
    assert {name: summary.method for name, summary in runs.items()} == {"full": "full", "qr": "qr"}
    assert all(summary.steps == STEPS for summary in runs.values())
    assert runs["qr"].embedding_params < runs["full"].embedding_params


def test_prepare(folder: Path) -> None:
    logs = pa.table({"user": ["a", "b", "a", "c"] * 10, "age": [1.0, 2.0, 1.5, 7.0] * 10, "clicked": [0, 1, 1, 0] * 10})
    pq.write_table(logs, folder / "logs.parquet")
    flags = ["--input", str(folder / "logs.parquet"), "--out", str(folder / "data"), "--label_column", "clicked"]
    flags += ["--dense_columns", "age", "--sparse_columns", "user"]
    command = torchx_run("prepare", "--", *flags, folder=folder)
    code, output = run(command, folder, timeout=150)
    assert code == 0, output
    splits = json.loads((folder / "data" / "manifest.json").read_text())["splits"]
    assert sum(sum(file["row_groups"]) for files in splits.values() for file in files) == 40


def test_recluster_job(data_flags: list[str], folder: Path) -> None:
    """A checkpoint of one rank, re-clustered on two, trained on from on one."""
    source, target = folder / "run", folder / "again"
    flags = [*JOB, *data_flags]
    one_process(*flags, "--run_dir", str(source), "--checkpoint_every_steps", "4", "--checkpoint_every_epochs", "0")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    options = ["-j", "1x2", "--", "--run_dir", str(source), "--output_dir", str(target)]
    code, output = run(torchx_run("recluster_job", *options, folder=folder), folder, timeout=150)
    assert code == 0, output
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    first, second = re.findall(r"val bce ([\d.]+) before, ([\d.]+) after", output)[0]
    saved = [bce for split, _, bce in scores(source) if split == "val"][-1]
    assert float(first) == pytest.approx(saved, abs=2e-4), "the same model, on other ranks"
    assert second != first
    *_, row = [row for row in read_metrics(target) if row["event"] == "recluster"]
    assert row["step"] == STEPS
    assert [table["version"] for table in row["tables"]] == [2, 2, 2]
    assert read_config(target).global_batch_size == 128
    resumed = one_process(*[*flags, "--run_dir", str(target), "--resume"])
    assert (resumed.steps, resumed.reclusterings) == (STEPS, 2)


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a wire: their names and addresses."""
    names = [f"cce{os.getpid()}{side}" for side in "ab"]
    hosts = [(name, f"10.213.7.{number}") for number, name in enumerate(names, 1)]
    made: list[str] = []

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in hosts:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_nodes_with_addresses_of_their_own(
    two_hosts: list[tuple[str, str]], data_flags: list[str], folder: Path
) -> None:
    """What reaches the other node goes over the wire between them: neither is there on its own loopback."""
    endpoint = f"{two_hosts[0][1]}:29500"
    flags = [*JOB, *data_flags, "--run_dir", str(folder / "run")]
    agents, logs = [], []
    for name, address in two_hosts:
        elastic = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
        elastic += ["--rdzv_id", "wire", "--local_addr", address]
        elastic += ["--rdzv_conf", f"is_host={int(not agents)}"]  # the name of this machine leads to neither address
        command = ["ip", "netns", "exec", name, "torchrun", *elastic]
        logs.append(folder / f"{name}.txt")
        with open(logs[-1], "w") as output:
            variables = environment(folder, GLOO_SOCKET_IFNAME="wire")
            agents.append(
                subprocess.Popen(
                    [*command, "-m", "dlrm_example.train", *flags],
                    cwd=ROOT,
                    env=variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        codes = [agent.wait(timeout=150) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert read_summary(folder / "run").world_size == 2
    check_like_one_process(folder / "run", data_flags, folder)


def test_recluster_says_what_is_missing(folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "dlrm_example.recluster", "--run_dir", str(folder / "none")]
    code, output = run([*command, "--output_dir", str(folder / "again")], folder)
    assert code == 2
    assert f"error: --run_dir {folder / 'none'} has no config.json" in output
