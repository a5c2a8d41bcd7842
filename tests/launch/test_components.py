"""What the components make of their arguments: TorchX's own checks, AppDefs, and jobs of schedulers that are not here."""

import importlib.util
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.specs.file_linter import validate

from launch import components
from tests.launch.jobs import COMPONENTS
from tests.launch.render import JOBS, KEPT, RUNS, SCHEDULERS, dryrun, rendered, snapshot
from tests.scripts import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:Cannot determine resource instance type:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Role \w+ configured with restarts:UserWarning"),  # Volcano's, below 1.5
]


@pytest.mark.parametrize("name", JOBS)
def test_torchx_accepts_the_component(name: str) -> None:
    assert validate(str(COMPONENTS), name) == []


def role(component: str, *options: str, flags: list[str]) -> Any:
    (only,) = dryrun(component, "local_cwd", list(options), flags, {})._app.roles
    return only


def test_dlrm() -> None:
    options = "-j 2x4 --name nightly --image i:1 --cpu 8 --gpu 4 --memMB 1000 --max_retries 2 --max_restarts 5"
    more = [
        "--rdzv_port",
        "29999",
        "--rdzv_conf",
        "join_timeout=900",
        "--env",
        "A=1,B=2",
        "--mounts",
        "type=bind,src=/data,dst=/data,readonly",
    ]
    made = role("dlrm", *options.split(), *more, flags=["--run_dir", "/shared/a run"])
    assert made.args[0] == "-c"
    assert made.args[1].endswith("-m dlrm_example.train --run_dir '/shared/a run'")
    for part in ("torchrun", "--rdzv_backend c10d", ":29999", "--nnodes 2", "--nproc_per_node 4"):
        assert part in made.args[1]
    assert (made.num_replicas, made.min_replicas, made.max_retries, made.image) == (2, 2, 2, "i:1")
    assert (made.resource.cpu, made.resource.gpu, made.resource.memMB) == (8, 4, 1000)
    wanted = {"A": "1", "B": "2", "PET_MAX_RESTARTS": "5", "PET_RDZV_CONF": "join_timeout=900"}
    assert wanted.items() <= made.env.items()
    assert made.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    (mount,) = made.mounts
    assert (mount.src_path, mount.dst_path, mount.read_only) == ("/data", "/data", True)


def test_what_dlrm_does_by_default() -> None:
    made = role("dlrm", flags=["--run_dir", "r"])
    assert "--rdzv_endpoint localhost:0" in made.args[1], "one node finds itself, at any free port"
    assert made.env["PET_MAX_RESTARTS"] == "3"
    assert "PET_RDZV_CONF" not in made.env
    assert (made.num_replicas, made.max_retries, made.resource.gpu) == (1, 0, 0)


def test_nodes_may_be_a_range() -> None:
    made = role("dlrm", "-j", "1:2x8", flags=["--run_dir", "r"])
    assert (made.min_replicas, made.num_replicas) == (1, 2)
    assert "--nnodes 1:2" in made.args[1]


def test_a_named_resource_comes_before_numbers() -> None:
    made = role("dlrm", "-h", "gpu.small", "--cpu", "1", flags=["--run_dir", "r"])
    assert (made.resource.cpu, made.resource.gpu) == (8, 1)


def test_recluster_job() -> None:
    made = role("recluster_job", "-j", "1x4", flags=["--run_dir", "/shared/run", "--output_dir", "/shared/again"])
    assert made.args[1].endswith("-m dlrm_example.recluster --run_dir /shared/run --output_dir /shared/again")
    assert made.name == "recluster"


def test_prepare_is_one_process() -> None:
    made = role("prepare", "--memMB", "999", flags=["--input", "/shared/logs", "--out", "/shared/data"])
    assert made.args[1].endswith("-m dlrm_example.data.prepare --input /shared/logs --out /shared/data")
    assert "--nnodes 1 --nproc_per_node 1" in made.args[1]
    assert (made.name, made.num_replicas, made.resource.memMB, made.env["PET_MAX_RESTARTS"]) == ("prepare", 1, 999, "0")


def test_sweep_is_a_role_a_run(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text(RUNS)
    options = ["--runs", str(tmp_path / "runs"), "--run_dir", "/shared/sweep", "-j", "1x2", "--cpu", "3"]
    roles = dryrun("sweep", "local_cwd", options, ["--epochs", "3"], {})._app.roles
    assert [made.name for made in roles] == ["full", "cce-8x"]
    assert all(made.num_replicas == 1 and made.resource.cpu == 3 for made in roles)
    assert roles[0].args[1].endswith("-m dlrm_example.train --epochs 3 --method full --run_dir /shared/sweep/full")
    assert "--method_options num_columns=4 --run_dir /shared/sweep/cce-8x" in roles[1].args[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full --method full", "line 1: 'full --method full' is not a name of a-z"),
        ("\nFull: --method full", "line 2: 'Full: --method full' is not a name of a-z"),
        ("a: --seed 1\na: --seed 2", "line 2: there is a run 'a' already"),
        ("# nothing\n", "names no runs"),
    ],
)
def test_files_of_runs_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text(text)
    with pytest.raises(ValueError, match=message):
        components.sweep(runs=str(tmp_path / "runs"), run_dir="r")


def test_a_run_of_a_sweep_has_one_node() -> None:
    with pytest.raises(ValueError, match="j=2x4: a run of a sweep has one node; try j=1x4"):
        components.sweep(runs="any", run_dir="r", j="2x4")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "WANDB_API_KEY"])
def test_secrets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"env has {name}: whoever can list jobs can read it"):
        components.dlrm(env={name: "hunter2"})


def missing(scheduler: str) -> bool:
    return scheduler == "kubernetes" and importlib.util.find_spec("kubernetes") is None


@pytest.mark.parametrize(("component", "scheduler"), KEPT)
def test_the_job_is_the_reviewed_one(component: str, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has nothing of the environment in which it was made."""
    if missing(scheduler):
        pytest.skip("TorchX's dry run for Kubernetes needs the package kubernetes, which is not installed")
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2")
    job = rendered(component, scheduler)
    assert "hunter2" not in job
    # Word by word: names that are made up have no fixed length, so YAML breaks its lines elsewhere each time.
    assert job.split() == snapshot(component, scheduler).read_text().split(), (
        "if this is meant: python -m tests.launch.render"
    )


@pytest.mark.skipif(not (ROOT / ".torchxconfig").exists(), reason="the wheel has no .torchxconfig")
def test_config_has_options_that_exist() -> None:
    config = ConfigParser()
    config.read(ROOT / ".torchxconfig")
    assert {"local_cwd", *SCHEDULERS} - {"slurm"} <= set(config.sections())
    with get_runner() as runner:
        for scheduler in set(config.sections()) - {"cli:run"}:
            known = [name for name, _ in runner.scheduler_run_opts(scheduler)]
            assert set(config[scheduler]) <= set(known)
            defaults = {name: option.default for name, option in runner.scheduler_run_opts(scheduler)}
            assert all(str(defaults[name]) != value for name, value in config[scheduler].items()), (
                "says what is the default"
            )
