"""What a training step and a lookup of compressed tables cost against full ones, on one rank, in one run.

    python -m benchmarks.step                   # some minutes; full tables need num_tables * V * dim * 4 bytes
    python -m benchmarks.step --quick           # small sizes, nothing written

A step is ids to rows, forward, backward and row-wise Adagrad in the backward; tables are table-wise with TorchRec's fused
kernels, under ``DistributedModelParallel`` with one rank and one thread, whose processor time counts. Ids are uniform or
Zipf. "In PyTorch" is the same without the native kernels: FBGEMM's lookups, ids to rows in PyTorch.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import Spread, ratio, take_turns, write_results
from benchmarks.rewrite import Sizes as IdSizes
from benchmarks.rewrite import make_ids
from benchmarks.sharded_step import Sizes, Way, build, quieten
from cce_torchrec.native import switched_off
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "step"
BATCHES = 4
FULL = "full tables"


class Steps:
    """Trains one model over some batches, again and again."""

    def __init__(self, way: Way, sizes: Sizes, zipf: bool, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context
        with context():
            self.model = build(way, sizes)
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


def measure(sizes: Sizes, columns: list[int], zipf: bool) -> dict[str, dict[str, list[float]]]:
    """Milliseconds, turn by turn, of each way: of ``step`` and of ``lookup``."""
    ways = {FULL: Steps(Way(False, "table_wise"), sizes, zipf, nullcontext)}
    for c in columns:
        for name, context in ((f"CCE, c={c}", nullcontext), (f"CCE, c={c}, in PyTorch", switched_off)):
            ways[name] = Steps(Way(True, "table_wise"), replace(sizes, num_columns=c), zipf, context)
    return {
        "step": take_turns({name: lambda way=way: way.turn(way.step) for name, way in ways.items()}, sizes.rounds),
        "lookup": take_turns({name: lambda way=way: way.turn(way.lookup) for name, way in ways.items()}, sizes.rounds),
    }


def page(sizes: Sizes, results: dict[str, dict[str, dict[str, list[float]]]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["", "step, ms (quartiles)", "x full", "forward alone, ms (quartiles)", "x full"]
    tables = []
    for ids, measured in results.items():
        rows = [
            [
                name,
                *(
                    text
                    for kind in ("step", "lookup")
                    for text in (
                        Spread.of(measured[kind][name]).text(),
                        ratio(measured[kind][name], measured[kind][FULL]).text(2),
                    )
                ),
            ]
            for name in measured["step"]
        ]
        tables.append(f"{ids} ids:\n\n{markdown_table(header, rows)}")
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Cost of a step on one rank

{(chr(10) * 2).join(tables)}

B={sizes.batch_size}, {sizes.num_tables} tables of one feature, one id a bag, D={sizes.dim}, V={sizes.num_embeddings:,}, CCE
k={sizes.num_rows}. Processor time of one thread; {sizes.rounds} turns each, in an order that changed; ratios are between
turns of the same round. A step is ids to rows, forward, backward and row-wise Adagrad. "In PyTorch" is without the native
kernels.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_embeddings", type=int, default=500_000, help="V of each table")
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25, help="turns of each way")
    parser.add_argument("--columns", type=int, nargs="+", default=[4, 8], help="c of CCE")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds, nothing written")
    args = parser.parse_args(arguments)
    quieten()
    torch.set_num_threads(1)
    sizes = Sizes(
        ranks=1, batch_size=args.batch_size, num_tables=26, dim=64, num_embeddings=args.num_embeddings, num_rows=1024,
        num_columns=4, bag=1, rounds=args.rounds, steps=1,
    )  # fmt: skip
    if args.quick:
        sizes = replace(sizes, batch_size=512, num_tables=4, num_embeddings=5000, num_rows=128, rounds=3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    made_by = provenance()
    results = {ids: measure(sizes, args.columns, ids == "Zipf") for ids in ("Uniform", "Zipf")}
    dist.destroy_process_group()
    text = page(sizes, results, made_by)
    print(text)
    if not args.quick:
        write_results(NAME, {"sizes": asdict(sizes), "provenance": made_by, "ms": results}, text)


if __name__ == "__main__":
    main()
