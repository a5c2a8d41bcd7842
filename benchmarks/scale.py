"""What ten tables of 10^10 ids and a thousand of 10^6 would take on 8, 128 and 1,024 GPUs, and whether the model is right.

The cost model of a re-clustering is calibrated on 1, 2 and 4 ranks of this machine (gloo, one thread each), then asked how
long re-clusterings of up to 10^7 ids take there, which are run. Times are CPU time of a rank, so that what else runs on the
machine counts for little; wall-clock time is recorded beside them.

    python -m benchmarks.scale            # writes docs/results/scale.{json,md}
"""

import argparse
import dataclasses
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.harness import RESULTS, ROOT, write_results
from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ResidualCCE,
    recluster,
)
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.simulate import Machine, Simulation, SimulationConfig, measure, simulate
from cce_torchrec.simulate.work import recluster_work
from dlrm_example.provenance import hardware, provenance
from dlrm_example.report import markdown_table

NAME = "scale"
CONFIG = Path("benchmarks") / "scale.yaml"
BUDGETS = {8: 64_000_000_000, 128: 24_000_000_000, 1024: 12_000_000_000}


@dataclasses.dataclass(frozen=True)
class Case:
    """A table to re-cluster."""

    num_embeddings: int
    embedding_dim: int
    method: CCE
    num_iterations: int

    def text(self) -> str:
        levels = f", {self.method.num_assigned} levels" if self.method.num_assigned > 1 else ""
        return (
            f"V={self.num_embeddings:,}, k={self.method.num_rows:,}, c={self.method.num_columns}, D={self.embedding_dim}, "
            f"{self.num_iterations} iterations{levels}"
        )


CASES = (
    Case(1_000_000, 32, CCE(num_rows=1024, num_columns=4), 10),
    Case(10_000_000, 16, CCE(num_rows=256, num_columns=4), 10),
    Case(300_000, 32, CCE(num_rows=2048, num_columns=2), 25),
    Case(500_000, 32, ResidualCCE(num_rows=256, num_levels=3, num_columns=4), 10),
)


def run_case(case: Case, machine: Machine, world_size: int) -> dict[str, float]:
    """Seconds that were predicted, and those that a re-clustering took."""
    table = CompressedEmbeddingBagConfig(
        name="t",
        num_embeddings=case.num_embeddings,
        embedding_dim=case.embedding_dim,
        feature_names=["f"],
        method=case.method,
    )
    collection = CompressedEmbeddingBagCollection(tables=[table])
    config = ReclusterConfig(num_iterations=case.num_iterations, tolerance=0.0)
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    predicted = machine.seconds(recluster_work(row_map, config, world_size, "cpu"))
    cpu, wall = time.process_time(), time.perf_counter()
    recluster(collection, seed=0, config=config, process_group=dist.group.WORLD)
    return {
        "predicted_cpu": predicted["fit"] + predicted["assign"],
        "predicted_communication": predicted["communication"],
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
    }


def run_rank(rank: int, port: int, world_size: int, cases: tuple[Case, ...], result: Any) -> None:
    """One rank's life."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    name = f"{hardware()}, {world_size} ranks of one thread"
    machine = measure(name, torch.device("cpu"), time.process_time)
    runs = [run_case(case, machine, world_size) for case in cases]
    of_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(of_ranks, runs)
    if rank == 0:
        means = [
            {key: sum(of_rank[number][key] for of_rank in of_ranks) / world_size for key in run}
            for number, run in enumerate(runs)
        ]
        result.put((dataclasses.asdict(machine), means))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world_size: int, cases: tuple[Case, ...]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The rates of this machine with so many busy ranks, and each case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, args=(port, world_size, cases, result), nprocs=world_size)
    return result.get()


def page(
    checks: dict[int, list[dict[str, float]]],
    cases: tuple[Case, ...],
    simulations: list[Simulation],
    machine: str,
    made_by: dict[str, Any],
) -> str:
    """The results for people."""
    rows = [
        [
            case.text(),
            str(ranks),
            f"{run['predicted_cpu']:.2f}",
            f"{run['cpu']:.2f}",
            f"{run['predicted_cpu'] / run['cpu']:.2f}",
            f"{run['predicted_communication']:.2f}",
            f"{run['wall']:.2f}",
        ]
        for number, case in enumerate(cases)
        for ranks, run in ((ranks, runs[number]) for ranks, runs in checks.items())
    ]
    head = ["table", "ranks", "CPU s predicted", "CPU s", "predicted / taken", "communication s predicted", "wall s"]
    ratios = [run["predicted_cpu"] / run["cpu"] for runs in checks.values() for run in runs]
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Internet scale, by simulation

{(ROOT / CONFIG).read_text().splitlines()[0].removeprefix("# ")}
[{CONFIG.name}](../../{CONFIG}), with the budget in the table; nothing is allocated, and no GPU was there.

{markdown_table(*plan_rows(simulations))}

A budget is for each GPU; bytes include the memory of a re-clustering. Sent bytes are of one step and rank, with 2,048
examples a rank: ids there and assignments back, pooled vectors and their gradients, all-reduced gradients of codebooks.
Distances are those of a re-clustering of all tables on one rank, at most. Its hours are those of one rank that is no GPU
but a core as it was measured here ({machine}), without communication: divide the distances by what your device does, or
measure it by `python -m cce_torchrec.simulate.measure`.

{chr(10).join(chosen(simulations))}

## The cost model of a re-clustering, checked

{markdown_table(head, rows)}

Rates were measured on as many ranks as ran (gloo, one thread each, all busy at once, {os.cpu_count()} cores), then the
cases were run. Predicted over taken CPU time of a rank: {min(ratios):.2f} to {max(ratios):.2f}. Wall-clock time depends
on what else runs on the machine, and holds the waits of ranks for each other. The counts that rates are multiplied with
(collectives and their bytes, distances) are compared exactly with what a run does in
`tests/distributed/test_recluster_work.py`.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def plan_rows(simulations: list[Simulation]) -> tuple[list[str], list[list[str]]]:
    """What each number of GPUs takes."""
    head = [
        "GPUs",
        "budget GB",
        "GB a rank, most (mean)",
        "ids MB",
        "vectors MB",
        "gradients MB",
        "expected loss",
        "distances",
        "re-clustering h",
        "planning s",
    ]
    rows = []
    for each in simulations:
        assert each.recluster_seconds is not None
        rows.append(
            [
                f"{each.plan.world_size:,}",
                f"{each.plan.budget_bytes / 1e9:.0f}",
                f"{each.rank_bytes[0] / 1e9:.2f} ({each.rank_bytes[1] / 1e9:.2f})",
                f"{(each.sent.ids + each.sent.assignments) / 1e6:.2f}",
                f"{each.sent.vectors / 1e6:.2f}",
                f"{each.sent.gradients / 1e6:.2f}",
                f"{each.plan.loss:.4f}",
                f"{each.distances:.2e}",
                f"{sum(each.recluster_seconds.values()) / 3600:.2f}",
                f"{each.planning_seconds:.1f}",
            ]
        )
    return head, rows


def chosen(simulations: list[Simulation]) -> list[str]:
    """What became of the tables."""
    return [
        f"* {each.plan.world_size:,} GPUs: "
        + "; ".join(f"{count:,} tables `{what}`" for what, count in each.summary()["tables"].items())
        + "."
        for each in simulations
    ]


def main(arguments: list[str] | None = None) -> None:
    """Calibrate, check, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="on which the model is checked")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    args = parser.parse_args(arguments)
    made_by = provenance()
    measured = {ranks: on_ranks(ranks, CASES) for ranks in args.ranks}
    rates = measured[args.ranks[-1]][0]
    network = rates.pop("network")
    machine = Machine(
        **{name: value if name == "name" else tuple(value) for name, value in rates.items()}, network=None
    )
    base = SimulationConfig.load(ROOT / CONFIG)
    simulations = [
        simulate(dataclasses.replace(base, budget_bytes=budget), ranks, machine) for ranks, budget in BUDGETS.items()
    ]
    checks = {ranks: runs for ranks, (_, runs) in measured.items()}
    text = page(checks, CASES, simulations, machine.name, made_by)
    print(text)
    content = {
        "provenance": made_by,
        "machine": {**dataclasses.asdict(machine), "network": network},
        "cases": [case.text() for case in CASES],
        "checks": checks,
        "simulations": [{"budget_bytes": each.plan.budget_bytes, **each.summary()} for each in simulations],
    }
    write_results(NAME, content, text, args.folder)


if __name__ == "__main__":
    main()
