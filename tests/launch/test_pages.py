"""Every `torchx` line of the pages about launching makes a job, of flags that exist; what nobody has run says so."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from dlrm_example import recluster
from dlrm_example.cli import parse_config
from dlrm_example.data.prepare_config import parse_prepare_config
from launch import components
from tests.launch.jobs import COMPONENTS
from tests.launch.render import RUNS, dryrun
from tests.scripts import ROOT

PAGES = [ROOT / "docs" / "launch.md", COMPONENTS.with_name("README.md")]
MORE_LINES = [ROOT / "docs" / "sweep.md"]
MARK = "# dry run only"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Cannot determine resource instance type:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Role \w+ configured with restarts:UserWarning"),  # Volcano's, below 1.5
]


def lines() -> list[str]:
    pages = [page for page in [*PAGES, *MORE_LINES] if page.exists()]
    return [line for page in pages for line in re.findall(r"torchx run -s [^`\n]*", page.read_text())]


def test_every_scheduler_has_a_line_on_every_page() -> None:
    for page in PAGES:
        if not page.exists():
            pytest.skip(f"the wheel has no {page.name}")
        found = set(re.findall(r"torchx run -s (\w+)", page.read_text()))
        assert found == {"local_cwd", "slurm", "kubernetes", "aws_batch"}, page


@pytest.mark.parametrize("line", lines(), ids=lambda line: "-".join(shlex.split(line)[3:6]))
def test_the_line_makes_a_job(line: str, tmp_path: Path) -> None:
    command, mark, _ = line.partition(MARK)
    words = shlex.split(command)
    scheduler = words[3]
    assert bool(mark) == (scheduler != "local_cwd"), "tried, or marked"
    if scheduler == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        pytest.skip("TorchX's dry run for Kubernetes needs the package kubernetes, which is not installed")
    split = words.index("--")
    name = next(word for word in words if word.startswith("launch/components.py:")).partition(":")[2]
    assert callable(getattr(components, name))
    start = words.index(f"launch/components.py:{name}")
    cfg = dict(pair.split("=") for pair in words[words.index("-cfg") + 1].split(",")) if "-cfg" in words else {}
    options, flags = words[start + 1 : split], words[split + 1 :]
    if name == "sweep":
        (tmp_path / "runs.txt").write_text(RUNS)
        options[options.index("--runs") + 1] = str(tmp_path / "runs.txt")
    assert dryrun(name, scheduler, options, flags, cfg)._app.roles
    if name == "recluster_job":
        assert recluster._parser().parse_args(flags).output_dir
    elif name == "prepare":
        assert parse_prepare_config(flags).out
    else:
        parse_config([*flags, *(["--run_dir", "runs/one"] if name == "sweep" else [])])
