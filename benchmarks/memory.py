"""What the process really takes for a collection of each method, beside what `memory_report` says that it stores.

    python -m benchmarks.memory                          # less than a minute
    python -m benchmarks.memory --folder docs/results    # and write the results down

A sharded collection on one rank, tables table-wise in fused kernels with row-wise Adagrad; every method is given an eighth of
the parameters of full tables. Memory is that of the process as Linux counts it, before the collection is made and after
its first steps, when what was freed has been given back.
"""

import argparse
import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks import process_memory
from benchmarks.harness import Spread, add_options, ratio, take_turns, write_results
from benchmarks.models import COMPRESSION, Sizes, Way
from benchmarks.ranks import free_port, rank_of
from benchmarks.step import Steps
from cce_torchrec import METHODS
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "memory"
SIZES = Sizes(
    ranks=1, batch_size=1024, num_tables=4, dim=64, num_embeddings=500_000, num_rows=1024, num_columns=4, bag=1, rounds=1,
    steps=1,
)  # fmt: skip
FULL = "full"
MEBI = 1 << 20


@dataclass(frozen=True)
class Turn:
    """Bytes of one collection."""

    params: int
    reported: int
    taken: int
    more_in_a_step: int


def turn(method: str) -> Turn:
    """Make a collection, train it for two steps, and let it go."""
    before = process_memory.resident()
    steps = Steps(Way(True, "table_wise", method=method), SIZES, False)
    steps.step()
    after = process_memory.resident()
    process_memory.reset_peak()
    steps.step()
    more = process_memory.peak() - after
    total = _collection(steps.model).memory_report(steps.dense_optimizer).total
    reported = total.codebook_bytes + total.assignment_bytes + total.optimizer_bytes
    del steps
    gc.collect()
    return Turn(4 * total.num_params, reported, after - before, more)


def _collection(model: DistributedModelParallel) -> Any:
    return model.module.collection


def measure(methods: list[str], rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """By method."""
    with rank_of(0, 1, free_port()):
        for _ in range(2):
            turn("cce")  # loads and warms what is loaded once
        return take_turns({name: lambda name=name: turn(name) for name in methods}, rounds, seconds)


def ratios(found: dict[str, list[Turn]]) -> dict[str, dict[str, Spread]]:
    """By method: to what is reported, and to full tables."""
    taken = {name: [float(turn.taken) for turn in turns] for name, turns in found.items()}
    return {
        name: {
            "taken / reported": ratio(taken[name], [turn.reported for turn in found[name]]),
            "taken / full": ratio(taken[name], taken[FULL]),
        }
        for name in found
    }


def page(found: dict[str, list[Turn]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = [
        "method", "parameters, MiB", "reported, MiB", "taken, MiB (quartiles)", "taken / reported", "taken / full",
        "more in a step, MiB",
    ]  # fmt: skip
    rows = [
        [
            name,
            f"{found[name][0].params / MEBI:.1f}",
            f"{found[name][0].reported / MEBI:.1f}",
            Spread.of([turn.taken / MEBI for turn in found[name]]).text(),
            of["taken / reported"].text(2),
            of["taken / full"].text(2),
            Spread.of([turn.more_in_a_step / MEBI for turn in found[name]]).text(),
        ]
        for name, of in ratios(found).items()
    ]
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Memory of a collection

{markdown_table(header, rows)}

{SIZES.num_tables} tables of V={SIZES.num_embeddings:,}, D={SIZES.dim}; every method but `full` has at most 1/{COMPRESSION}
of the parameters of full tables. "Reported": codebooks or decoders, assignments and optimizer state, by `memory_report`.
"Taken": what the process takes more than before the collection was made, after a step of B={SIZES.batch_size}, the batches
included; "more in a step" is the peak of another step beside that. Under `DistributedModelParallel` the dense
parameters of decode methods also have gradients as large as they are, which stay from step to step and no report counts.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add_options(parser, rounds=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made_by = provenance()
    found = measure(list(dict.fromkeys([FULL, *args.methods])), args.rounds, args.seconds)
    text = page(found, made_by)
    print(text)
    if args.folder is not None:
        spreads = {f"{name}, {what}": asdict(s) for name, of in ratios(found).items() for what, s in of.items()}
        turns = {name: [asdict(turn) for turn in turns] for name, turns in found.items()}
        content = {"sizes": asdict(SIZES), "provenance": made_by, "ratios": spreads, "bytes": turns}
        write_results(NAME, content, text, args.folder)


if __name__ == "__main__":
    main()
