"""Every method at equal parameters, inside the DLRM on MovieLens-100K: scores, sizes, and the time of a step.

    python -m benchmarks.methods

Trains every method at several budgets over three seeds, all with the settings of `dlrm_example.recipe` but for fewer epochs,
and times a training step of each beside that of full tables. Finished runs in `runs/methods` are not run again (`--fresh`
forgets them). Prints the table, and writes `docs/results/methods.md`, `.json` and `.png`.
"""

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import movielens_8x
from benchmarks.harness import RESULTS, ROOT, Spread, markdown_table, provenance, ratio, take_turns, write_results
from cce_torchrec import METHODS
from cce_torchrec.methods import DecodeMethod
from dlrm_example.budget import plan_tables
from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.distributed import World, process_group
from dlrm_example.model import build_model, build_optimizer, collection_of, shard_model
from dlrm_example.plots import Curve, plot_bands
from dlrm_example.recipe import movielens_config
from dlrm_example.records import Summary
from dlrm_example.train import load_dataset, make_loaders, set_up_process

NAME = "methods"
COMPRESSIONS = (2.0, 4.0, 8.0)
SEEDS = (1, 2, 3)
EPOCHS = 3
TIMED_COMPRESSION = 8.0
ROUNDS, STEPS = 25, 8  # of the timing: turns of each method, and steps a turn

Case = tuple[str, float]  # method and compression
Runs = dict[Case, list[Summary]]  # one a seed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    arguments = parser.parse_args(argv)
    set_up_logging()
    if arguments.fresh:
        shutil.rmtree(ROOT / "runs" / NAME, ignore_errors=True)
    with process_group() as world:
        runs: Runs = {case: [movielens_8x.run_or_read(config(*case, seed)) for seed in SEEDS] for case in cases()}
        num_bytes = {case: stored_bytes(config(*case, SEEDS[0]), world) for case in runs}
        times = step_times(world)
    table = results_table(runs, num_bytes, times)
    content = {
        "provenance": provenance(),
        "settings": {**asdict(config("full", 1.0, SEEDS[0])), "run_dir": None, "method": None, "seed": SEEDS},
        "runs": [asdict(run) for found in runs.values() for run in found],
        "bytes": list(num_bytes.values()),
        "step_seconds": times,
    }
    write_results(NAME, content, page(table, content))
    draw(runs, RESULTS / f"{NAME}.png")
    print(table)
    return 0


def cases() -> list[Case]:
    """Methods and compressions; the full table comes first, and in one size."""
    others = itertools.product((method for method in METHODS if method != "full"), COMPRESSIONS)
    return [("full", 1.0), *others]


def config(method: str, compression: float, seed: int) -> TrainConfig:
    folder = f"runs/{NAME}/{method}-{compression:g}x-{seed}"
    return movielens_config(
        method, folder, compression=compression, seed=seed, epochs=EPOCHS, print_progress=False, recluster_count=2
    )


def stored_bytes(settings: TrainConfig, world: World) -> int:
    """Of all tables: parameters, assignments and the coefficients of hashes."""
    info = load_dataset(settings, world).info
    total = collection_of(build_model(plan_tables(info, settings), info, settings)).memory_report().total
    return total.codebook_bytes + total.assignment_bytes


def step_times(world: World) -> dict[str, list[float]]:
    """Processor seconds of a training step of each method, one number a round, in which all take turns.

    Elapsed time on one thread is as much where nothing else runs, and would say more of what else does where something runs.
    """
    return take_turns({method: stepper(method, world) for method in METHODS}, ROUNDS)


def stepper(method: str, world: World) -> Callable[[], float]:
    """Trains some steps and says how long one took; a first turn is taken here, and not timed."""
    settings = config(method, 1.0 if method == "full" else TIMED_COMPRESSION, SEEDS[0])
    set_up_process(settings)
    dataset = load_dataset(settings, world)
    model = shard_model(build_model(plan_tables(dataset.info, settings), dataset.info, settings), settings, world)
    optimizer = build_optimizer(model, settings)
    batches = list(itertools.islice(make_loaders(dataset, settings, world).train.epoch(1), STEPS))

    def turn() -> float:
        started = time.process_time()
        for batch in batches:
            optimizer.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            optimizer.step()
        return (time.process_time() - started) / len(batches)

    turn()
    return turn


def results_table(runs: Runs, num_bytes: dict[Case, int], times: dict[str, list[float]]) -> str:
    """A line for each method and budget; scores are the mean and standard deviation over the seeds."""
    lines = []
    for (method, compression), found in runs.items():
        is_timed = compression in (1.0, TIMED_COMPRESSION)
        lines.append(
            [
                f"`{method}`",
                f"{compression:g}x",
                f"{found[0].embedding_params:,}",
                f"{num_bytes[method, compression]:,}",
                *(movielens_8x.mean_and_spread([getattr(run, name) for run in found]) for name in SCORES),
                ratio(times[method], times["full"]).text(2) if is_timed else "",
            ]
        )
    return markdown_table(["method", "fewer params", "params", "bytes", *SCORES.values(), "step / full step"], lines)


SCORES = {
    "best_val_bce": "best val BCE",
    "best_val_auroc": "val AUROC",
    "test_bce": "test BCE",
    "test_auroc": "test AUROC",
}


def draw(runs: Runs, target: Path) -> None:
    """Best validation BCE against parameters."""
    curves: dict[str, dict[str, Curve]] = {"row methods": {}, "decode methods": {}}
    for method in METHODS:
        found = [summaries for (key, _), summaries in runs.items() if key == method]
        curve = [(each[0].embedding_params, [run.best_val_bce for run in each]) for each in found]
        kind = "decode methods" if issubclass(METHODS[method], DecodeMethod) else "row methods"
        for panel in curves if method == "full" else [kind]:
            curves[panel][method] = curve
    plot_bands(curves, target, "best validation BCE")


def page(table: str, content: dict[str, Any]) -> str:
    settings = {name: value for name, value in content["settings"].items() if value not in (None, "")}
    full = Spread.of([1000 * seconds for seconds in content["step_seconds"]["full"]])
    listed = ", ".join(f"{name} `{value}`" for name, value in settings.items() if name != "compression")
    source = ", ".join(f"{name} `{value}`" for name, value in content["provenance"].items())
    return f"""# Every method at equal parameters, in a DLRM on MovieLens-100K

{table}

![Best validation BCE by embedding parameters]({NAME}.png)

Scores are the mean ± standard deviation over seeds {", ".join(map(str, SEEDS))}: best validation BCE and AUROC over
the epochs, test scores at the epoch of the best BCE. Three seeds do not tell methods apart whose means are nearer than these
spreads. «Params» and «bytes» are those of all tables together, small ones that stay full included; bytes count everything
that is stored, assignments and hash coefficients too. `low_dim` grows by four dims at a time, and uses less of some budgets.

«Step / full step» is the processor time of a whole training step on one thread, of the DLRM with its optimizers,
relative to full tables': median and quartiles of {ROUNDS} rounds, in which all methods take turns of {STEPS} steps,
compressed {TIMED_COMPRESSION:g} times. A full step took {full.text()} ms. All these tables fit in caches, full ones too:
what is compared is what methods compute, not what large tables cost.

`pq` is trained from scratch here, as all others are, so it is `ce` with stored hashes and more columns; what it is for is to
compress tables that were trained (`compress(..., from_trained=True)`). All methods have the same settings, which were not
tuned for each: {listed}.

Made by {source}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


if __name__ == "__main__":
    sys.exit(main())
