"""What it costs to store less of the assignments: as bits, or of warm ids only, on one rank, in one run.

    python -m benchmarks.pointer_storage              # two or three minutes
    python -m benchmarks.pointer_storage --record     # docs/results/pointer_storage.{json,md}

A step as in `benchmarks/step.py`; turns of all ways alternate, in processor time of one thread. The first tenth of the ids
is warm, which are the most frequent ones where ids are Zipf's.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.harness import Spread, ratio, take_turns, write_results
from benchmarks.models import Sizes, Way
from benchmarks.ranks import free_port, rank_of
from benchmarks.step import Steps
from cce_torchrec.methods.assignments import AssignmentStorage
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native import switched_off
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "pointer_storage"
PLAIN = "integers, all ids"


def storages(sizes: Sizes) -> dict[str, AssignmentStorage]:
    """What is compared."""
    tenth = sizes.num_embeddings // 10
    return {
        PLAIN: AssignmentStorage(),
        "bits, all ids": AssignmentStorage(bit_packed=True),
        "integers, a tenth of the ids": AssignmentStorage(num_assigned_ids=tenth),
        "bits, a tenth of the ids": AssignmentStorage(bit_packed=True, num_assigned_ids=tenth),
    }


def make_steps(sizes: Sizes, storage: AssignmentStorage, zipf: bool, context: Any) -> tuple[Steps, int]:
    """Steps of a model whose slots are taken, and the bytes stored for an id."""
    steps = Steps(Way(True, "table_wise", storage=storage), sizes, zipf, context)
    row_maps = [module for module in steps.model.modules() if isinstance(module, CCERowMap)]
    generator = torch.Generator().manual_seed(0)
    for row_map in row_maps:
        assignments = torch.randint(
            row_map.num_values, (len(row_map.assignments), row_map.assignments_per_id), generator=generator
        )
        ids = None if row_map.warm_ids is None else torch.arange(len(row_map.warm_ids))
        row_map.put(row_map.encoding.encode(assignments), ids)
    return steps, row_maps[0].stored_bytes()


def measure(sizes: Sizes, zipf: bool, context: Any) -> dict[str, Any]:
    """Milliseconds, turn by turn, of each storage: of ``step`` and of ``lookup``; and bytes a table."""
    made = {name: make_steps(sizes, storage, zipf, context) for name, storage in storages(sizes).items()}
    kinds: dict[str, Callable[[Steps], Callable[[], None]]] = {"step": lambda s: s.step, "lookup": lambda s: s.lookup}
    return {
        "bytes": {name: stored for name, (_, stored) in made.items()},
        **{
            kind: take_turns(
                {name: lambda steps=steps, work=work: steps.turn(work(steps)) for name, (steps, _) in made.items()},
                sizes.rounds,
            )
            for kind, work in kinds.items()
        },
    }


def page(sizes: Sizes, results: dict[str, dict[str, Any]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["assignments", "bytes a table", "step, ms (quartiles)", "x", "forward alone, ms (quartiles)", "x"]
    tables = []
    for case, measured in results.items():
        rows = [[name, f"{stored:,}"] for name, stored in measured["bytes"].items()]
        for row in rows:
            for kind in ("step", "lookup"):
                mine, plain = measured[kind][row[0]], measured[kind][PLAIN]
                row += [Spread.of(mine).text(), ratio(mine, plain).text(2)]
        tables.append(f"{case}:\n\n{markdown_table(header, rows)}")
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# What it costs to store less of the assignments

{(chr(10) * 2).join(tables)}

CCE with c={sizes.num_columns}, k={sizes.num_rows}, D={sizes.dim}; {sizes.num_tables} tables of one feature,
V={sizes.num_embeddings:,}, B={sizes.batch_size}, one id a bag. Processor time of one thread; {sizes.rounds} turns each, in an
order that changed; ratios are between turns of the same round. A step is ids to rows, forward, backward and row-wise
Adagrad. The first tenth of the ids is warm: of uniform ids a tenth of the lookups, of Zipf's more than four fifths.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_embeddings", type=int, default=500_000, help="V of each table")
    parser.add_argument("--num_columns", type=int, default=8, help="c")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way")
    parser.add_argument("--record", action="store_true", help="write the results")
    args = parser.parse_args(arguments)
    sizes = Sizes(
        ranks=1, batch_size=4096, num_tables=26, dim=64, num_embeddings=args.num_embeddings, num_rows=1024,
        num_columns=args.num_columns, bag=1, rounds=args.rounds, steps=1,
    )  # fmt: skip
    made_by = provenance()
    with rank_of(0, 1, free_port()):
        results = {
            "Uniform ids": measure(sizes, False, nullcontext),
            "Zipf ids": measure(sizes, True, nullcontext),
            "Zipf ids, without the native kernels": measure(
                replace(sizes, rounds=-(-sizes.rounds // 2)), True, switched_off
            ),
        }
    text = page(sizes, results, made_by)
    print(text)
    if args.record:
        write_results(NAME, {"sizes": asdict(sizes), "provenance": made_by, "results": results}, text)


if __name__ == "__main__":
    main()
