"""Do two ranks train what one rank trains? CCE at 8x on MovieLens-100K, ten seeds, the same 1024 rows a step.

    python benchmarks/two_ranks.py

Every run is a process of its own, `python -m dlrm_example.train` on one rank and `torchrun --nproc_per_node 2 -m
dlrm_example.train` on two, with the planner's plan and re-clusterings across ranks. A control says what differences to
expect: one rank again, on exactly the rows of the two-rank run, those of rank 0 first. That run is mathematically the same as
two ranks, so what it differs by from the first is left-out rows and the order of float additions. Finished runs in
`runs/two_ranks` are not run again (`--fresh` forgets them). Writes `docs/results/two_ranks.md` and `.json`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torchrec.datasets.utils import Batch

from dlrm_example.data.memory import InMemoryLoader
from dlrm_example.provenance import provenance
from dlrm_example.recipe import SETTINGS
from dlrm_example.records import Summary, read_json, read_summary, write_json
from dlrm_example.train import main as train_main

ROOT = Path(__file__).resolve().parent.parent
NAME = "two_ranks"
SEEDS = tuple(range(1, 11))
ARMS = {"one": "1 rank", "two": "2 ranks", "control": "1 rank, control"}
GLOBAL_BATCH = 1024
PROVENANCE = "provenance.json"
SCORES = {"best_val_bce": "best val BCE", "test_bce": "test BCE"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    parser.add_argument("--control_run", type=int, metavar="SEED", help="only the control of one seed")
    arguments = parser.parse_args(argv)
    if arguments.control_run is not None:
        return control_run(arguments.control_run)
    if arguments.fresh:
        shutil.rmtree(ROOT / "runs" / NAME, ignore_errors=True)
    for seed in SEEDS:
        for arm in ARMS:
            run_unless_finished(seed, arm)
    content = results()
    target = ROOT / "docs" / "results"
    write_json(target / f"{NAME}.json", content)
    (target / f"{NAME}.md").write_text(page(content))
    print(page(content))
    return 0


def run_dir(seed: int, arm: str) -> str:
    return f"runs/{NAME}/{arm}-{seed}"


def flags(seed: int, arm: str) -> list[str]:
    words = ["--method", "cce", "--compression", "8"]
    for name, value in SETTINGS.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    batch_size = GLOBAL_BATCH // 2 if arm == "two" else GLOBAL_BATCH
    return [*words, "--batch_size", str(batch_size), "--seed", str(seed), "--run_dir", run_dir(seed, arm)]


def command(seed: int, arm: str) -> list[str]:
    """What a user would type, but for `python` and `torchrun` being this environment's."""
    if arm == "control":
        return ["python", "benchmarks/two_ranks.py", "--control_run", str(seed)]
    launcher = ["python"] if arm == "one" else ["torchrun", "--nproc_per_node", "2"]
    return [*launcher, "-m", "dlrm_example.train", *flags(seed, arm)]


def control_run(seed: int) -> int:
    """One rank on the rows of two: an odd one left out of each batch, and each rank's together."""
    share = InMemoryLoader._share

    def share_of_two(loader: InMemoryLoader, rows: torch.Tensor) -> Batch:
        if loader.shuffle_seed is None:
            return share(loader, rows)
        rows = rows[: len(rows) - len(rows) % 2]
        return share(loader, torch.cat([rows[0::2], rows[1::2]]))

    with mock.patch.object(InMemoryLoader, "_share", share_of_two):
        return train_main([*flags(seed, "control"), "--overwrite"])


def run_unless_finished(seed: int, arm: str) -> None:
    words = command(seed, arm)
    folder = ROOT / run_dir(seed, arm)
    if (folder / PROVENANCE).exists() and read_json(folder / PROVENANCE)["command"] == " ".join(words):
        return
    source = {**provenance(), "command": " ".join(words)}
    program = str(Path(sys.executable).parent / words[0])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ}
    overwrite = [] if arm == "control" else ["--overwrite"]
    subprocess.run([program, *words[1:], *overwrite], check=True, cwd=ROOT, env=environment)
    write_json(folder / PROVENANCE, source)


def results() -> dict[str, Any]:
    runs = {arm: [read_summary(ROOT / run_dir(seed, arm)) for seed in SEEDS] for arm in ARMS}
    return {
        "provenance": [read_json(ROOT / run_dir(seed, arm) / PROVENANCE) for seed in SEEDS for arm in ARMS],
        "global_batch": GLOBAL_BATCH,
        "seeds": SEEDS,
        "comparison": {score: compare(runs, score) for score in SCORES},
        "runs": {arm: [asdict(run) for run in of_arm] for arm, of_arm in runs.items()},
    }


def compare(runs: dict[str, list[Summary]], score: str) -> dict[str, Any]:
    """One score: is two ranks' mean over seeds further from one rank's than two errors of their difference?"""
    values = {arm: [float(getattr(run, score)) for run in of_arm] for arm, of_arm in runs.items()}
    one, two = values["one"], values["two"]
    error = ((statistics.variance(one) + statistics.variance(two)) / len(SEEDS)) ** 0.5
    mean_difference = statistics.mean(two) - statistics.mean(one)
    return {
        **values,
        "two_minus_one": _differences(two, one),
        "control_minus_one": _differences(values["control"], one),
        "two_minus_control": _differences(two, values["control"]),
        "spread_over_seeds": {arm: statistics.stdev(values[arm]) for arm in ARMS},
        "mean_difference": mean_difference,
        "standard_error": error,
        "within_seed_noise": abs(mean_difference) <= 2 * error,
    }


def _differences(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(these, those, strict=True)]


def page(content: dict[str, Any]) -> str:
    sections = "\n\n".join(_section(SCORES[name], content["comparison"][name]) for name in SCORES)
    sources = content["provenance"]
    commits = ", ".join(f"`{commit}`" for commit in sorted({source["commit"] for source in sources}))
    hardware = "; ".join(sorted({f"{s['hardware']}, torch {s['torch']}, Python {s['python']}" for s in sources}))
    commands = "\n".join(source["command"] for source in sources[: len(ARMS)])
    seconds = [_mean_seconds(content["runs"][arm]) for arm in ("one", "two")]
    return f"""# Two ranks against one

CCE at 8 times fewer embedding parameters on MovieLens-100K, {content["global_batch"]} rows a step: on one rank, and on two
with half of them each, under the plan of TorchRec's planner, re-clustered across ranks. Runs of one seed start from the same
weights and see the same rows in the same order, except that two ranks leave a row out of batches of odd length.

The control is one rank again, on exactly the rows of the two-rank run, those of rank 0 first. It is the same run
mathematically, and shows how far apart two runs of one seed get through that row and the order of float additions alone.

{sections}

Seconds of training and of re-clustering, mean over seeds: {seconds[0]} on one rank, {seconds[1]} on two, which shared the
same two cores with other work.

Made by `python benchmarks/two_ranks.py`, which runs (here for the first seed)

```text
{commands}
```

at commit {commits} on {hardware}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def _section(title: str, compared: dict[str, Any]) -> str:
    names = ("one", "two", "control", "two_minus_one", "control_minus_one")
    heads = [f"{title}, 1 rank", "2 ranks", "control", "2 ranks - 1 rank", "control - 1 rank"]
    lines = [f"| seed | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for index, seed in enumerate(SEEDS):
        cells = [f"{compared[name][index]:{'+' if 'minus' in name else ''}.4f}" for name in names]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    lines.append(f"| mean ± std | {' | '.join(_mean_and_spread(compared[name]) for name in names)} |")
    verdict = "agree" if compared["within_seed_noise"] else "do **not** agree"
    return (
        "\n".join(lines)
        + f"""

One and two ranks {verdict} within seed noise: their means differ by {compared["mean_difference"]:+.4f}, and two standard
errors of that difference over {len(SEEDS)} seeds are {2 * compared["standard_error"]:.4f}. The largest difference of one seed
is {_largest(compared["two_minus_one"])} between one and two ranks, and {_largest(compared["control_minus_one"])} between
one rank and its control.

Seed by seed, a sharper question, with the standard error of each mean: two ranks minus one rank
{_mean_and_error(compared["two_minus_one"])}, control minus one rank {_mean_and_error(compared["control_minus_one"])}, two
ranks minus control {_mean_and_error(compared["two_minus_control"])}."""
    )


def _mean_and_error(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def _largest(differences: Sequence[float]) -> str:
    return f"{max(map(abs, differences)):.4f}"


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _mean_seconds(runs: Sequence[dict[str, Any]]) -> str:
    return " and ".join(
        f"{statistics.mean(run[f'{part}_seconds'] for run in runs):.1f}" for part in ("train", "recluster")
    )


if __name__ == "__main__":
    sys.exit(main())
