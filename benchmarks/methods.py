"""Every method at equal parameters, inside the DLRM on MovieLens-100K: scores, sizes, and the time of a step.

    python -m benchmarks.methods

Trains every method at several budgets over three seeds, all with the settings of `dlrm_example.recipe` but for fewer epochs,
and times a training step of each beside that of full tables. Finished runs in `runs/methods` are not run again (`--fresh`
forgets them). Prints the table, and writes `docs/results/methods.md`, `.json` and `.png`.
"""

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS, ROOT, Spread, ratio, take_turns, write_results
from cce_torchrec import METHODS
from cce_torchrec.methods import DecodeMethod
from dlrm_example.budget import plan_tables
from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.distributed import World, process_group
from dlrm_example.model import build_model, build_optimizer, shard_model
from dlrm_example.plots import Panel, draw_panels, save
from dlrm_example.provenance import provenance
from dlrm_example.recipe import movielens_config
from dlrm_example.sweep.grid import FULL, Case, expand
from dlrm_example.sweep.page import scores_table
from dlrm_example.sweep.results import Results, read_results
from dlrm_example.sweep.runs import make_all
from dlrm_example.train import load_dataset, make_loaders, set_up_process

NAME = "methods"
COMPRESSIONS = (2.0, 4.0, 8.0)
SEEDS = (1, 2, 3)
EPOCHS = 3
TIMED_COMPRESSION = 8.0
ROUNDS, STEPS = 25, 8  # of the timing: turns of each method, and steps a turn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    arguments = parser.parse_args(argv)
    set_up_logging()
    os.chdir(ROOT)
    if arguments.fresh:
        shutil.rmtree(Path("runs") / NAME, ignore_errors=True)
    runs = {case: config(case) for case in cases()}
    make_all(list(runs.values()))
    results = read_results(runs)
    with process_group() as world:
        times = step_times(world)
    table = results_table(results, times)
    content = {
        "provenance": provenance(),
        "settings": {**asdict(config(cases()[0])), "run_dir": None, "method": None, "seed": SEEDS},
        "runs": {case.name: summary for case, summary in results.summaries.items()},
        "step_seconds": times,
    }
    write_results(NAME, content, page(table, content))
    save(draw(results), RESULTS / f"{NAME}.png")
    print(table)
    return 0


def cases() -> list[Case]:
    """Methods and compressions; the full table comes first, and in one size."""
    return expand(METHODS, COMPRESSIONS, SEEDS)


def config(case: Case) -> TrainConfig:
    settings = {"compression": case.compression, "seed": case.seed, "epochs": EPOCHS, "recluster_count": 2}
    return movielens_config(case.method, f"runs/{NAME}/{case.name}", print_progress=False, **settings)


def step_times(world: World) -> dict[str, list[float]]:
    """Processor seconds of a training step of each method, one number a round, in which all take turns.

    Elapsed time on one thread is as much where nothing else runs, and would say more of what else does where something runs.
    """
    return take_turns({method: stepper(method, world) for method in METHODS}, ROUNDS)


def stepper(method: str, world: World) -> Callable[[], float]:
    """Trains some steps and says how long one took; a first turn is taken here, and not timed."""
    settings = config(Case(method, 1.0 if method == FULL else TIMED_COMPRESSION, SEEDS[0]))
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


def results_table(results: Results, times: dict[str, list[float]]) -> str:
    """A line for each method and budget; scores are the mean and standard deviation over the seeds."""
    timed = {(method, 1.0 if method == FULL else TIMED_COMPRESSION): seconds for method, seconds in times.items()}
    relative = {budget: ratio(seconds, times[FULL]).text(2) for budget, seconds in timed.items()}
    return scores_table(results, {"step / full step": relative})


def draw(results: Results) -> Figure:
    """Best validation BCE against parameters."""
    curves, level = (find("embedding_params", "best_val_bce") for find in (results.curves, results.level))
    kinds = {"row methods": False, "decode methods": True}
    panels = [
        Panel(
            curves={
                name: curve for name, curve in curves.items() if issubclass(METHODS[name], DecodeMethod) == decodes
            },
            level=level,
            size="embedding parameters",
            score="best validation BCE",
            title=title,
        )
        for title, decodes in kinds.items()
    ]
    return draw_panels([panels])


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
spreads. «Params» and «bytes in all» are those of all tables together, small ones that stay full included; bytes count
everything that is stored, assignments and hash coefficients too. `low_dim` grows by four dims at a time, and uses less of
some budgets.

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
