"""TorchX components of the project: ``torchx run -s SCHEDULER launch/components.py:NAME ... -- flags of the program``.

Each wraps ``torchx.components.dist.ddp``: TorchElastic (``torchrun``) on every node, which finds the other nodes, starts the
processes and starts them again when one dies. What ``torchrun`` has no argument for there, it reads from ``PET_*`` variables.
"""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Dict, List, Optional

import torchx.components.dist as torchx_dist
import torchx.specs as specs

SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)


def dlrm(
    *script_args: str,
    j: str = "1x1",
    name: str = "dlrm",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_backend: str = "c10d",
    rdzv_port: int = 29500,
    rdzv_conf: str = "",
) -> specs.AppDef:
    """Train the DLRM example: ``python -m dlrm_example.train`` on every process.

    Args:
        script_args: its flags, after ``--``; --run_dir on storage that all nodes share
        j: nodes x processes a node, such as 2x8; 1:2x8 goes on with 1 node where the other does not come back
        name: of the job
        image: container image with this project installed, where the scheduler runs one
        h: a named resource, instead of cpu, gpu and memMB
        cpu: cores a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        env: variables of the processes, such as NCCL_SOCKET_IFNAME=eth0; no secrets, they can be read in the job
        mounts: such as type=bind,src=/data,dst=/data,readonly
        max_restarts: how often TorchElastic starts the processes again after one died; they resume by themselves
        max_retries: how often the scheduler starts a failed job again, which then resumes
        rdzv_backend: of the rendezvous of several nodes
        rdzv_port: on the first node
        rdzv_conf: of the rendezvous, such as join_timeout=900
    """
    return torchx_dist.ddp(
        *script_args,
        m="dlrm_example.train",
        name=name,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=_environment(env, max_restarts, rdzv_conf),
        mounts=mounts,
        max_retries=max_retries,
        rdzv_backend=rdzv_backend,
        rdzv_port=rdzv_port,
    )


def prepare(
    *script_args: str,
    name: str = "prepare",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 4,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Prepare data: ``python -m dlrm_example.data.prepare`` in one process, which itself uses all cores.

    Args:
        script_args: its flags, after ``--``: --input and --out on storage that the training can read
        name: of the job
        image: container image with this project installed, where the scheduler runs one
        h: a named resource, instead of cpu and memMB
        cpu: cores
        memMB: memory, in MB
        env: variables of the process; no secrets, they can be read in the job
        mounts: such as type=bind,src=/data,dst=/data
        max_retries: how often the scheduler starts a failed job again, which goes on with the parts that are not there yet
    """
    return torchx_dist.ddp(
        *script_args,
        m="dlrm_example.data.prepare",
        name=name,
        image=image,
        h=h,
        cpu=cpu,
        memMB=memMB,
        j="1x1",
        env=_environment(env, max_restarts=0, rdzv_conf=""),
        mounts=mounts,
        max_retries=max_retries,
    )


def sweep(
    *script_args: str,
    runs: str,
    run_dir: str,
    j: str = "1x1",
    name: str = "sweep",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train the DLRM example several times at once: one role, and one node, a run.

    For schedulers that let the parts of a job end one by one: local_cwd, kubernetes. Slurm ends a job's parts 60 seconds
    after the first has ended, AWS Batch when the first one in the file has; there, start a job of `dlrm` a run.

    Args:
        script_args: flags that all runs share, after ``--``
        runs: a file with one run a line: its name, a colon and its own flags; blank lines and lines after # are left out
        run_dir: a folder; each run has its --run_dir there, by its name
        j: 1 x processes a run
        name: of the job
        image: container image with this project installed, where the scheduler runs one
        h: a named resource a run, instead of cpu, gpu and memMB
        cpu: cores a run
        gpu: GPUs a run
        memMB: memory a run, in MB
        env: variables of the processes; no secrets, they can be read in the job
        mounts: such as type=bind,src=/data,dst=/data,readonly
        max_restarts: how often TorchElastic starts a run's processes again after one died; they resume by themselves
        max_retries: how often the scheduler starts a failed job again, which then resumes
    """
    if torchx_dist.parse_nnodes(j)[:2] != (1, 1):
        raise ValueError(f"j={j}: a run of a sweep has one node; try j=1x{j.rpartition('x')[2]}")
    roles = []
    for run, flags in _read_runs(runs).items():
        app = dlrm(
            *(*script_args, *flags, "--run_dir", f"{run_dir}/{run}"),
            j=j,
            name=name,
            image=image,
            h=h,
            cpu=cpu,
            gpu=gpu,
            memMB=memMB,
            env=env,
            mounts=mounts,
            max_restarts=max_restarts,
            max_retries=max_retries,
        )
        roles.append(dataclasses.replace(app.roles[0], name=run))
    return specs.AppDef(name=name, roles=roles)


def recluster_job(
    *script_args: str,
    j: str = "1x1",
    name: str = "recluster",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_backend: str = "c10d",
    rdzv_port: int = 29500,
    rdzv_conf: str = "",
) -> specs.AppDef:
    """Re-cluster a saved model: ``python -m dlrm_example.recluster`` on every process.

    Args:
        script_args: its flags, after ``--``: --run_dir and --output_dir on storage that all nodes share
        j: nodes x processes a node, such as 2x8
        name: of the job
        image: container image with this project installed, where the scheduler runs one
        h: a named resource, instead of cpu, gpu and memMB
        cpu: cores a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        env: variables of the processes; no secrets, they can be read in the job
        mounts: such as type=bind,src=/data,dst=/data,readonly
        max_restarts: how often TorchElastic starts the processes again after one died
        max_retries: how often the scheduler starts a failed job again
        rdzv_backend: of the rendezvous of several nodes
        rdzv_port: on the first node
        rdzv_conf: of the rendezvous, such as join_timeout=900
    """
    return torchx_dist.ddp(
        *script_args,
        m="dlrm_example.recluster",
        name=name,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=_environment(env, max_restarts, rdzv_conf),
        mounts=mounts,
        max_retries=max_retries,
        rdzv_backend=rdzv_backend,
        rdzv_port=rdzv_port,
    )


def _environment(env: dict[str, str] | None, max_restarts: int, rdzv_conf: str) -> dict[str, str]:
    """The variables of the job, with what `torchrun` is to read there."""
    secrets = [key for key in env or {} if SECRET.search(key)]
    if secrets:
        raise ValueError(
            f"env has {', '.join(secrets)}: whoever can list jobs can read it. Let the scheduler provide secrets on the "
            "nodes: a mounted Kubernetes secret, an instance's role, a file that only the user can read."
        )
    # Each agent counts restarts for itself, so processes cannot tell old words in a store from new: a new store each time.
    torchrun = {"PET_MAX_RESTARTS": str(max_restarts), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return torchrun | ({"PET_RDZV_CONF": rdzv_conf} if rdzv_conf else {}) | (env or {})


def _read_runs(file: str) -> dict[str, list[str]]:
    """Flags by name of the run."""
    runs: dict[str, list[str]] = {}
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        run, colon, flags = text.partition(":")
        if not colon or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", run):
            wanted = "a name of a-z, 0-9 and -, a colon and flags, such as 'cce-1: --method cce --seed 1'"
            raise ValueError(f"{file}, line {number}: {line!r} is not {wanted}")
        if run in runs:
            raise ValueError(f"{file}, line {number}: there is a run {run!r} already; give this one another name")
        runs[run] = shlex.split(flags)
    if not runs:
        raise ValueError(f"{file} names no runs; write one a line, such as 'cce-1: --method cce --seed 1'")
    return runs
