"""What made a result: every record names its command, commit, hardware and versions."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]  # of the repository, where this is not installed elsewhere


def provenance() -> dict[str, str]:
    """Command, commit (with `-dirty` where code was changed since), hardware, load, versions."""
    return {
        "command": command(),
        "commit": commit(),
        "hardware": hardware(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """The line that started this process, as one would type it where its files lie: paths are cut down to names."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]
    arguments = [Path(text).name if Path(text).is_absolute() else text for text in sys.argv[1:]]
    return shlex.join(["python", *program, *arguments])


def commit() -> str:
    """Git's, or `unknown` where the code does not lie in its own repository."""
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return "unknown"
    words = (":(exclude)docs", ":(exclude)*.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *words)
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def hardware() -> str:
    """The processor, as the machine names it, how many cores, and any GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([_cpu_name(), f"{os.cpu_count()} cores", *gpus])


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
