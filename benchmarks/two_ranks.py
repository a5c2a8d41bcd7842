"""Do two ranks train what one rank trains? CCE at 8x on MovieLens-100K, three seeds, the same 1024 rows a step.

    python benchmarks/two_ranks.py

Every run is a process of its own, `python -m dlrm_example.train` on one rank and `torchrun --nproc_per_node 2 -m
dlrm_example.train` on two, with the planner's plan and re-clusterings across ranks. Finished runs in `runs/two_ranks` are
not run again (`--fresh` forgets them). Writes `docs/results/two_ranks.md` and `.json`.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dlrm_example.recipe import SETTINGS
from dlrm_example.records import SUMMARY, Summary, read_json, read_summary, write_json

ROOT = Path(__file__).resolve().parent.parent
NAME = "two_ranks"
SEEDS = (1, 2, 3)
GLOBAL_BATCH = 1024
PROVENANCE = "provenance.json"
SCORES = {"best_val_bce": "best val BCE", "test_bce": "test BCE"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    folder = ROOT / "runs" / NAME
    if parser.parse_args(argv).fresh:
        shutil.rmtree(folder, ignore_errors=True)
    for seed in SEEDS:
        for world_size in (1, 2):
            run_unless_finished(seed, world_size)
    content = results()
    target = ROOT / "docs" / "results"
    write_json(target / f"{NAME}.json", content)
    (target / f"{NAME}.md").write_text(page(content))
    print(page(content))
    return 0


def run_dir(seed: int, world_size: int) -> str:
    return f"runs/{NAME}/{world_size}-{seed}"


def command(seed: int, world_size: int) -> list[str]:
    """What a user would type, but for `python` and `torchrun` being this environment's."""
    launcher = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
    flags = ["--method", "cce", "--compression", "8"]
    for name, value in SETTINGS.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    flags += ["--batch_size", str(GLOBAL_BATCH // world_size), "--seed", str(seed)]
    return [*launcher, "-m", "dlrm_example.train", *flags, "--run_dir", run_dir(seed, world_size)]


def run_unless_finished(seed: int, world_size: int) -> None:
    words = command(seed, world_size)
    folder = ROOT / run_dir(seed, world_size)
    if (folder / SUMMARY).exists() and read_json(folder / PROVENANCE)["command"] == " ".join(words):
        return
    source = provenance(words)
    program = str(Path(sys.executable).parent / words[0])
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([program, *words[1:], "--overwrite"], check=True, cwd=ROOT, env=environment)
    write_json(folder / PROVENANCE, source)


def results() -> dict[str, Any]:
    runs = {(size, seed): read_summary(ROOT / run_dir(seed, size)) for size in (1, 2) for seed in SEEDS}
    return {
        "provenance": [read_json(ROOT / run_dir(seed, size) / PROVENANCE) for seed in SEEDS for size in (1, 2)],
        "global_batch": GLOBAL_BATCH,
        "seeds": SEEDS,
        "comparison": {name: compare(runs, name) for name in SCORES},
        "runs": [asdict(run) for run in runs.values()],
    }


def compare(runs: dict[tuple[int, int], Summary], score: str) -> dict[str, Any]:
    """One score seed by seed: how far two ranks are from one, beside how far seeds are from each other."""
    one, two = ([getattr(runs[size, seed], score) for seed in SEEDS] for size in (1, 2))
    differences = [b - a for a, b in zip(one, two, strict=True)]
    spread = statistics.stdev(one)
    return {
        "one_rank": one,
        "two_ranks": two,
        "difference": differences,
        "largest_difference": max(map(abs, differences)),
        "spread_over_seeds_on_one_rank": spread,
        "within_seed_noise": max(map(abs, differences)) < spread,
    }


def page(content: dict[str, Any]) -> str:
    sections = "\n\n".join(_section(SCORES[name], content["comparison"][name]) for name in SCORES)
    sources = content["provenance"]
    commits = sorted({source["commit"] for source in sources})
    hardware = sorted({f"{s['hardware']}, torch {s['torch']}, Python {s['python']}" for s in sources})
    commands = "\n".join(source["command"] for source in sources[:2])
    seconds = [_mean_seconds(content["runs"], size) for size in (1, 2)]
    return f"""# Two ranks against one

CCE at 8 times fewer embedding parameters on MovieLens-100K, {content["global_batch"]} rows a step: on one rank, and on two
with half of them each, under the plan of TorchRec's planner, re-clustered across ranks. Runs of one seed start from the same
weights and see the same rows in the same order, so they differ by the order of float additions, and what follows from it.

{sections}

Seconds of training and of re-clustering, mean over seeds: {seconds[0]} on one rank, {seconds[1]} on two, which share the
same two cores.

Made by `python benchmarks/two_ranks.py`, which runs (here for the first seed)

```text
{commands}
```

at commit {", ".join(f"`{commit}`" for commit in commits)} on {"; ".join(hardware)}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def _section(title: str, compared: dict[str, Any]) -> str:
    rows = zip(SEEDS, compared["one_rank"], compared["two_ranks"], compared["difference"], strict=True)
    lines = [f"| {seed} | {one:.5f} | {two:.5f} | {difference:+.5f} |" for seed, one, two, difference in rows]
    means = " | ".join(_mean_and_spread(compared[name]) for name in ("one_rank", "two_ranks", "difference"))
    verdict = (
        "They agree within seed noise" if compared["within_seed_noise"] else "They do **not** agree within seed noise"
    )
    head = f"| seed | {title}, 1 rank | {title}, 2 ranks | difference |\n|---|---:|---:|---:|"
    return "\n".join([head, *lines, f"| mean ± std | {means} |"]) + (
        f"\n\n{verdict}: the largest difference is {compared['largest_difference']:.5f}, the standard deviation over seeds "
        f"on one rank {compared['spread_over_seeds_on_one_rank']:.5f}."
    )


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.5f} ± {statistics.stdev(values):.5f}"


def _mean_seconds(runs: Sequence[dict[str, Any]], world_size: int) -> str:
    mine = [run for run in runs if run["world_size"] == world_size]
    return " and ".join(
        f"{statistics.mean(run[f'{part}_seconds'] for run in mine):.1f}" for part in ("train", "recluster")
    )


def provenance(words: Sequence[str]) -> dict[str, str]:
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no", "cce_torchrec", "dlrm_example") else ""
    return {
        "command": " ".join(words),
        "commit": _git("rev-parse", "HEAD") + dirty,
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
