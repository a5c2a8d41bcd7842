"""What a training step and a lookup of compressed tables cost against full ones, on one rank, in one run.

    python -m benchmarks.step                          # some minutes; full tables need num_tables * V * dim * 4 bytes
    python -m benchmarks.step --folder docs/results    # and write the results down
    python -m benchmarks.step --methods                # every method, 8 times smaller, beside full tables; smaller sizes

A step is ids to rows, forward, backward and row-wise Adagrad in the backward; tables are table-wise with TorchRec's fused
kernels, under ``DistributedModelParallel`` with one rank and one thread, whose processor time counts. Ids are uniform or
Zipf. "In PyTorch" is the same without the native kernels: FBGEMM's lookups, ids to rows in PyTorch. The dense parameters of
decode methods and projections have Adagrad after the backward. Pages of freed tensors stay with the process.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import (
    Spread,
    add_options,
    copying,
    keep_freed_memory,
    ratio,
    take_turns,
    times_ceiling,
    write_results,
)
from benchmarks.models import COMPRESSION, Sizes, Way, build, memory_bytes
from benchmarks.ranks import free_port, rank_of
from benchmarks.rewrite import Sizes as IdSizes
from benchmarks.rewrite import make_ids
from cce_torchrec import METHODS
from cce_torchrec.native import switched_off
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "step"
BATCHES = 4
FULL = "full tables"
COPY = "copy, s a byte"
KINDS = ("step", "lookup")


class Steps:
    """Trains one model over some batches, again and again."""

    def __init__(
        self, way: Way, sizes: Sizes, zipf: bool, context: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._context = context
        with context():
            self.model = build(way, sizes)
        self.bytes = memory_bytes(way, sizes)
        dense = [parameter for _, parameter in in_backward_optimizer_filter(self.model.named_parameters())]
        self.dense_optimizer = torch.optim.Adagrad(dense, lr=0.01) if dense else None
        generator = torch.Generator().manual_seed(0)
        ids = IdSizes(
            num_tables=sizes.num_tables, batch_size=sizes.batch_size, num_embeddings=sizes.num_embeddings, dim=sizes.dim
        )
        lengths = torch.ones(sizes.num_tables * sizes.batch_size, dtype=torch.int64)
        keys = [f"f{t}" for t in range(sizes.num_tables)]
        self._batches = [
            KeyedJaggedTensor(keys, make_ids(ids, zipf, generator), lengths=lengths) for _ in range(BATCHES)
        ]
        self._gradient = torch.randn(sizes.batch_size, sizes.num_tables * sizes.dim, generator=generator)
        self._gradient /= sizes.batch_size
        self._count = 0

    def _forward(self) -> Tensor:
        self._count += 1
        values: Tensor = self.model(self._batches[self._count % BATCHES]).values()
        return values

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self._forward().backward(self._gradient)
        if self.dense_optimizer is not None:
            self.dense_optimizer.step()
            self.dense_optimizer.zero_grad()

    def lookup(self) -> None:
        """Forward alone."""
        with torch.no_grad():
            self._forward()

    def turn(self, work: Callable[[], None]) -> float:
        """Milliseconds of processor time; the piece of work before it brings the model back into the caches."""
        with self._context():
            work()
            start = time.process_time()
            work()
            return (time.process_time() - start) * 1e3


def ways_of(columns: list[int], sizes: Sizes, zipf: bool) -> dict[str, Steps]:
    """CCE with some numbers of columns beside full tables."""
    ways = {FULL: Steps(Way(False, "table_wise"), sizes, zipf, nullcontext)}
    for c in columns:
        for name, context in ((f"CCE, c={c}", nullcontext), (f"CCE, c={c}, in PyTorch", switched_off)):
            ways[name] = Steps(Way(True, "table_wise"), replace(sizes, num_columns=c), zipf, context)
    return ways


def ways_of_methods(sizes: Sizes, zipf: bool) -> dict[str, Steps]:
    """Every method beside full tables."""
    full = {FULL: Steps(Way(False, "table_wise"), sizes, zipf, nullcontext)}
    named = {name: Way(True, "table_wise", method=name) for name in METHODS}
    return full | {name: Steps(way, sizes, zipf, nullcontext) for name, way in named.items()}


def measure(ways: dict[str, Steps], rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds, turn by turn, of each way: of ``step`` and of ``lookup``; and the bytes that these must move."""
    works: dict[str, Callable[[Steps], Callable[[], None]]] = {"step": lambda w: w.step, "lookup": lambda w: w.lookup}
    found: dict[str, Any] = {"bytes": {name: way.bytes for name, way in ways.items()}}
    for kind in KINDS:
        turns = {name: lambda way=way, kind=kind: way.turn(works[kind](way)) for name, way in ways.items()}
        found[kind] = take_turns({**turns, COPY: copying()}, rounds, seconds / len(KINDS))
    return found


def ratios(measured: dict[str, Any]) -> dict[str, dict[str, Spread]]:
    """By way: to full tables and to the ceiling, of ``step`` and ``lookup``."""
    result: dict[str, dict[str, Spread]] = {}
    for name, num_bytes in measured["bytes"].items():
        result[name] = {}
        for kind in KINDS:
            turns = measured[kind]
            result[name][f"{kind} / full"] = ratio(turns[name], turns[FULL])
            seconds = [ms / 1e3 for ms in turns[name]]
            result[name][f"{kind} / ceiling"] = times_ceiling(seconds, num_bytes[kind], turns[COPY])
    return result


def page(sizes: Sizes, results: dict[str, dict[str, Any]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = [""] + [
        text for kind in ("step", "forward") for text in (f"{kind}, ms (quartiles)", "x full", "MB", "x copy")
    ]
    tables = []
    for ids, measured in results.items():
        rows = []
        for name, spreads in ratios(measured).items():
            row = [name]
            for kind in KINDS:
                row += [Spread.of(measured[kind][name]).text(), spreads[f"{kind} / full"].text(2)]
                row += [f"{measured['bytes'][name][kind] / 1e6:.1f}", spreads[f"{kind} / ceiling"].text(1)]
            rows.append(row)
        tables.append(f"{ids} ids:\n\n{markdown_table(header, rows)}")
    rounds = min(len(measured[kind][FULL]) for measured in results.values() for kind in KINDS)
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Cost of a step on one rank

{(chr(10) * 2).join(tables)}

B={sizes.batch_size}, {sizes.num_tables} tables of one feature, one id a bag, D={sizes.dim}, V={sizes.num_embeddings:,}, CCE
k={sizes.num_rows}; methods by their name are {COMPRESSION} times smaller than full tables. Processor time of one thread; at
least {rounds} turns each, in an order that changed; ratios are between turns of the same round. A step is ids to rows,
forward, backward and row-wise Adagrad; "forward" is a lookup alone. Freed tensors' pages stay with the process, for all ways
alike. "In PyTorch" is without the native kernels. "MB" must move: ids, assignments, pooled vectors, and rows (each once) with
their gradients and optimizer state; "x copy" is against copying as much in memory.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_embeddings", type=int, default=500_000, help="V of each table")
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--columns", type=int, nargs="+", default=[4, 8], help="c of CCE")
    parser.add_argument("--methods", action="store_true", help="every method instead, at smaller sizes")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds")
    add_options(parser, rounds=25)
    args = parser.parse_args(arguments)
    sizes = Sizes(
        ranks=1, batch_size=args.batch_size, num_tables=26, dim=64, num_embeddings=args.num_embeddings, num_rows=1024,
        num_columns=4, bag=1, rounds=args.rounds, steps=1,
    )  # fmt: skip
    if args.methods:
        sizes = replace(sizes, batch_size=1024, num_tables=8, dim=32, num_embeddings=50_000)
    if args.quick:
        sizes = replace(sizes, batch_size=512, num_tables=4, num_embeddings=5000, num_rows=128, rounds=3)
    made_by = provenance()
    keep_freed_memory()
    results = {}
    with rank_of(0, 1, free_port()):
        for ids in ("Uniform", "Zipf"):
            zipf = ids == "Zipf"
            ways = ways_of_methods(sizes, zipf) if args.methods else ways_of(args.columns, sizes, zipf)
            results[ids] = measure(ways, sizes.rounds, args.seconds / 2)
    text = page(sizes, results, made_by)
    print(text)
    if args.folder is not None:
        spreads = {
            f"{name}, {ids} ids, {what}": asdict(spread)
            for ids, measured in results.items()
            for name, of in ratios(measured).items()
            for what, spread in of.items()
        }
        name = f"{NAME}_methods" if args.methods else NAME
        content = {"sizes": asdict(sizes), "provenance": made_by, "ratios": spreads, "ms": results}
        write_results(name, content, text.replace(f"{NAME}.json", f"{name}.json"), args.folder)


if __name__ == "__main__":
    main()
