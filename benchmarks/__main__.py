"""The short set: one benchmark after another at small sizes, less than 5 minutes on two quiet cores.

    python -m benchmarks                            # or: make bench
    python -m benchmarks --only step recluster
    python -m benchmarks --folder docs/results      # instead of runs/bench

Each benchmark is a process of its own, and starts no further round when its share of the time is over, so that a slow machine
takes fewer rounds. What one prints is in NAME.md, its raw numbers in NAME.json, all ratios in bench.json; a benchmark that
fails leaves its words in NAME.log, and the others still run.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Spread, write_results
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table, text_table

HEAD = ("benchmark", "ratio", "median", "quartiles")


@dataclass(frozen=True)
class Benchmark:
    """One of the set.

    Attributes:
        name: of its results.
        words: the module and its arguments.
        shown: which of its ratios are printed, a regular expression.
    """

    name: str
    words: str
    shown: str


SHORT = (
    Benchmark("step", "step --num_embeddings 200000 --rounds 9 --seconds 45", r"^CCE, c=\d, (Uniform|Zipf)"),
    Benchmark("step_methods", "step --methods --rounds 3 --seconds 20", "Zipf ids, step / full"),
    Benchmark("rewrite", "rewrite --num_embeddings 100000 --rounds 9 --seconds 10", r"Zipf"),
    Benchmark("sharded_step", "sharded_step --rounds 7 --seconds 30", "^compressed"),
    Benchmark("recluster", "recluster --rounds 2 --seconds 10", ""),
    Benchmark("loader", "loader --quick --rounds 3 --seconds 15", ""),
    Benchmark("memory", "memory --rounds 1", "reported"),
    Benchmark("startup", "startup --rounds 3 --seconds 15", "cce_torchrec|dlrm"),
)


def run(benchmark: Benchmark, folder: Path) -> dict[str, Spread] | None:
    """Its ratios, or ``None`` where it failed."""
    module, *arguments = benchmark.words.split()
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *arguments, "--folder", str(folder)]
    log, results = folder / f"{benchmark.name}.log", folder / f"{benchmark.name}.json"
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        return None
    log.unlink()
    found: dict[str, dict[str, float]] = json.loads(results.read_text())["ratios"]
    return {name: Spread(**spread) for name, spread in found.items()}


def rows(benchmark: Benchmark, ratios: dict[str, Spread]) -> list[list[str]]:
    """The lines of the table."""
    return [
        [benchmark.name, name, f"{spread.median:.2f}", f"{spread.low:.2f} - {spread.high:.2f}"]
        for name, spread in ratios.items()
        if re.search(benchmark.shown, name)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run them, print a table, write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in SHORT], help="some of the set")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where results are written")
    args = parser.parse_args(argv)
    chosen = [each for each in SHORT if args.only is None or each.name in args.only]
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made_by, table, all_ratios, failed = provenance(), [], {}, []
    for number, benchmark in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {benchmark.name}: ", end="", flush=True)
        started = time.perf_counter()
        ratios = run(benchmark, folder)
        print(f"{time.perf_counter() - started:.0f} s" + ("" if ratios is not None else " FAILED"), flush=True)
        if ratios is None:
            failed.append(benchmark.name)
            continue
        table += rows(benchmark, ratios)
        all_ratios[benchmark.name] = ratios
    print(f"\n{text_table(HEAD, table)}\n\nAll numbers: {folder}")
    content: dict[str, Any] = {"provenance": made_by, "failed": failed}
    content["ratios"] = {name: {what: vars(each) for what, each in of.items()} for name, of in all_ratios.items()}
    write_results("bench", content, f"# The short set of benchmarks\n\n{markdown_table(HEAD, table)}\n", folder)
    for name in failed:
        print(f"{name} failed: see {folder / name}.log", file=sys.stderr)
    return 1 if failed else 0


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text as it is, and the defaults."""


if __name__ == "__main__":
    sys.exit(main())
