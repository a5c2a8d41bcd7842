"""How long it takes to import the library, and until a first batch is looked up, beside PyTorch and TorchRec alone.

    python -m benchmarks.startup                          # less than a minute
    python -m benchmarks.startup --folder docs/results    # and write the results down

Every turn is a Python process of its own, with files in the system's cache; the native kernels have been built. Times are
processor time of the process, which hardly depends on what else the machine does. The bytes are the most that it held in
memory, which at least must be brought there.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness import ROOT, Spread, add_options, copying, ratio, take_turns, times_ceiling, write_results
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "startup"
FIRST_LOOKUP = """
import torch
from torchrec import KeyedJaggedTensor
from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
table = CompressedEmbeddingBagConfig(
    name="t", num_embeddings=1000, embedding_dim=16, feature_names=["f"], method=CCE(num_rows=16, num_columns=4)
)
collection = CompressedEmbeddingBagCollection(tables=[table])
collection(KeyedJaggedTensor(["f"], torch.tensor([1, 2]), lengths=torch.tensor([2])))
"""
PROGRAMS = {
    "Python": "",
    "import torch": "import torch",
    "import torchrec": "import torchrec",
    "import cce_torchrec": "import cce_torchrec",
    "cce_torchrec, first lookup": FIRST_LOOKUP,
    "import dlrm_example.train": "import dlrm_example.train",
}
SAY_PEAK = "\nprint(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
BASE = "import torchrec"


@dataclass(frozen=True)
class Turn:
    """One process."""

    cpu: float
    wall: float
    peak_bytes: int


def run(program: str) -> Turn:
    """Run a program.

    Raises:
        subprocess.CalledProcessError: where it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started, before = time.perf_counter(), _cpu_of_children()
    command = [sys.executable, "-W", "ignore", "-c", program + SAY_PEAK]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    wall, cpu = time.perf_counter() - started, _cpu_of_children() - before
    return Turn(cpu, wall, 1024 * int(output.split()[-2]))  # "VmHWM:  1234 kB"


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(rounds: int, seconds: float) -> tuple[dict[str, list[Turn]], list[float]]:
    """By program; and what copying takes, s a byte."""
    run(FIRST_LOOKUP)  # files come into the system's cache
    ways: dict[str, Callable[[], Any]] = {name: lambda text=text: run(text) for name, text in PROGRAMS.items()}
    found = take_turns({**ways, "copy": copying()}, rounds, seconds)
    copies = found.pop("copy")
    return found, copies


def ratios(found: dict[str, list[Turn]], copies: list[float]) -> dict[str, dict[str, Spread]]:
    """By program: to importing TorchRec alone, and to the ceiling."""
    cpu = {name: [turn.cpu for turn in turns] for name, turns in found.items()}
    return {
        name: {
            f"x {BASE}": ratio(cpu[name], cpu[BASE]),
            "ceiling": times_ceiling(cpu[name], max(turn.peak_bytes for turn in found[name]), copies),
        }
        for name in found
    }


def page(found: dict[str, list[Turn]], copies: list[float], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["", "CPU s (quartiles)", "wall s (quartiles)", f"x {BASE}", "peak MB", "x copy"]
    rows = [
        [
            name,
            Spread.of([turn.cpu for turn in found[name]]).text(2),
            Spread.of([turn.wall for turn in found[name]]).text(2),
            of[f"x {BASE}"].text(2),
            f"{max(turn.peak_bytes for turn in found[name]) / 1e6:.0f}",
            of["ceiling"].text(0),
        ]
        for name, of in ratios(found, copies).items()
    ]
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Import and start-up time

{markdown_table(header, rows)}

A process each, {len(copies)} turns, in an order that changed; ratios are between turns of the same round, of processor time.
"Peak" is the most memory that the process held; "x copy" is against copying as much. The first lookup finds the native
kernels built.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=5)
    args = parser.parse_args(arguments)
    made_by = provenance()
    found, copies = measure(args.rounds, args.seconds)
    text = page(found, copies, made_by)
    print(text)
    if args.folder is not None:
        spreads = {f"{name}, {what}": asdict(s) for name, of in ratios(found, copies).items() for what, s in of.items()}
        turns = {name: [asdict(turn) for turn in turns] for name, turns in found.items()}
        write_results(
            NAME, {"provenance": made_by, "ratios": spreads, "turns": turns, "copy": copies}, text, args.folder
        )


if __name__ == "__main__":
    main()
