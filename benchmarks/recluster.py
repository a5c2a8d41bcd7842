"""Time and peak memory of a re-clustering against V, k and c, on one rank and on several, in one run.

    python -m benchmarks.recluster                        # some minutes
    python -m benchmarks.recluster --ranks 1 2 4 --large  # and V = 10^7

The ranks are processes of one thread; all numbers of ranks take turns in one run, in which those that are not asked wait. A
turn is the first re-clustering of a random CCE table, 25 iterations a column.

Bytes that must move: assignments that are read and written, the codebooks that are read and written, and in each iteration
the points of the sample. Memory is what the process takes at most beside what it took before, as Linux counts it.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import process_memory
from benchmarks.harness import Spread, add_options, copying, ratio, take_turns, times_ceiling, write_results
from benchmarks.ranks import on_ranks
from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    recluster,
)
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster.workspace import recluster_workspace
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "recluster"
CONFIG = ReclusterConfig(num_iterations=25, tolerance=0.0)
MEBI = 1 << 20


@dataclass(frozen=True)
class Case:
    """A table to re-cluster."""

    num_embeddings: int = 200_000
    num_rows: int = 512
    num_columns: int = 4
    dim: int = 16  # of a column

    @property
    def text(self) -> str:
        return f"V={self.num_embeddings:,}, k={self.num_rows:,}, c={self.num_columns}"

    def collection(self) -> CompressedEmbeddingBagCollection:
        """The same random one each time."""
        torch.manual_seed(0)
        method = CCE(num_rows=self.num_rows, num_columns=self.num_columns)
        table = CompressedEmbeddingBagConfig(
            name="t",
            num_embeddings=self.num_embeddings,
            embedding_dim=self.dim * self.num_columns,
            feature_names=["f"],
            method=method,
        )
        return CompressedEmbeddingBagCollection(tables=[table])


BASE = Case()
CASES = (
    BASE,
    replace(BASE, num_embeddings=1_000_000),
    replace(BASE, num_rows=256),
    replace(BASE, num_rows=1024),
    replace(BASE, num_columns=2),
    replace(BASE, num_columns=8),
)
LARGE = replace(BASE, num_embeddings=10_000_000)


def bytes_to_move(case: Case) -> int:
    """On all ranks together, at least."""
    row_map = _row_map(case.collection())
    assignments = row_map.assignments.numel() * row_map.assignments.element_size()
    dim = case.num_columns * case.dim
    points = min(case.num_embeddings, CONFIG.points_per_centroid * case.num_rows)
    return 2 * assignments + 2 * 2 * case.num_rows * dim * 4 + (CONFIG.num_iterations + 1) * points * dim * 4


def expected_memory(case: Case, ranks: int) -> int:
    """The library's own upper bound, in bytes."""
    return sum(recluster_workspace(_row_map(case.collection()), CONFIG, ranks, "cpu"))


def _row_map(collection: CompressedEmbeddingBagCollection) -> CCERowMap:
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    return row_map


@dataclass(frozen=True)
class Turn:
    """What one rank saw of one re-clustering."""

    wall: float
    cpu: float
    extra_bytes: int
    error: float


def turn(case: Case, ranks: int, groups: dict[int, Any]) -> Turn | None:
    """A re-clustering by the first ``ranks`` ranks; ``None`` on the others, which wait."""
    mine = None
    if dist.get_rank() < ranks:
        collection = case.collection()
        before = process_memory.resident()
        process_memory.reset_peak()
        dist.barrier(groups[ranks])
        wall, cpu = time.perf_counter(), time.process_time()
        report = recluster(collection, seed=0, config=CONFIG, process_group=groups[ranks])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        extra = process_memory.peak() - before
        mine = Turn(wall, cpu, extra, report.tables[0].relative_squared_error)
    dist.barrier()
    return mine


def run_rank(cases: list[Case], counts: list[int], rounds: int, seconds: float) -> dict[str, list[Any]]:
    """One rank's life: its turns, by case and number of ranks."""
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in counts}
    for ranks in counts:
        turn(Case(5000, 64, 2, 16), ranks, groups)  # loads and warms what is loaded once
    ways: dict[str, Any] = {"copy": copying()}
    for case in cases:
        for ranks in counts:
            ways[key(case, ranks)] = lambda case=case, ranks=ranks: turn(case, ranks, groups)
    return take_turns(ways, rounds, seconds)


def key(case: Case, ranks: int) -> str:
    """Of a way."""
    return f"{case.text}, {ranks} rank{'s' if ranks > 1 else ''}"


def measure(cases: list[Case], counts: list[int], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """By way and kind of measurement: the values, turn by turn, of the slowest or largest rank."""
    of_ranks = on_ranks(max(counts), run_rank, cases, counts, rounds, seconds)
    found: dict[str, dict[str, list[float]]] = {"copy": {"seconds a byte": of_ranks[0]["copy"]}}
    for case in cases:
        for ranks in counts:
            turns = list(zip(*(of_rank[key(case, ranks)] for of_rank in of_ranks[:ranks]), strict=True))
            found[key(case, ranks)] = {
                name: [max(getattr(mine, name) for mine in one) for one in turns]
                for name in ("wall", "cpu", "extra_bytes", "error")
            }
    return found


def ratios(cases: list[Case], counts: list[int], found: dict[str, dict[str, list[float]]]) -> dict[str, Spread]:
    """Of this run: to the ceiling, and of one rank to several."""
    copies = found["copy"]["seconds a byte"]
    result = {}
    for case in cases:
        one = found[key(case, counts[0])]
        name = key(case, counts[0])
        result[f"{name} / ceiling"] = times_ceiling(one["cpu"], bytes_to_move(case), copies)
        for ranks in counts[1:]:
            many = found[key(case, ranks)]
            for kind in ("wall", "cpu"):
                result[f"{name} / {ranks} ranks, {kind}"] = ratio(one[kind], many[kind])
    return result


def page(
    cases: list[Case], counts: list[int], found: dict[str, dict[str, list[float]]], made_by: dict[str, Any]
) -> str:
    """The results for people."""
    header = [
        "table", "ranks", "wall s (quartiles)", "CPU s a rank", "x faster, wall", "x faster, CPU", "relative error",
        "peak extra MiB", "bound MiB", "MB to move", "x copy",
    ]  # fmt: skip
    spreads = ratios(cases, counts, found)
    rows = []
    for case in cases:
        for ranks in counts:
            of = found[key(case, ranks)]
            gains = [spreads.get(f"{key(case, counts[0])} / {ranks} ranks, {kind}") for kind in ("wall", "cpu")]
            ceiling = times_ceiling(of["cpu"], bytes_to_move(case) / ranks, found["copy"]["seconds a byte"])
            rows.append(
                [
                    case.text,
                    str(ranks),
                    Spread.of(of["wall"]).text(2),
                    Spread.of(of["cpu"]).text(2),
                    *("" if gain is None else gain.text(2) for gain in gains),
                    f"{of['error'][0]:.3f}",
                    f"{max(of['extra_bytes']) / MEBI:.0f}",
                    f"{expected_memory(case, ranks) / MEBI:.0f}",
                    f"{bytes_to_move(case) / 1e6:.0f}",
                    ceiling.text(0),
                ]
            )
    copy = Spread.of([1e-9 / a_byte for a_byte in found["copy"]["seconds a byte"]])
    facts = ", ".join(f"{name} `{value}`" for name, value in made_by.items())
    return f"""# Time and memory of a re-clustering

{markdown_table(header, rows)}

A random CCE table of {BASE.dim} dims a column; {CONFIG.num_iterations} iterations. Ranks are processes of one thread; times
are those of the slowest rank of a turn, {len(found["copy"]["seconds a byte"])} turns each, in an order that changed; "x
faster" is against {counts[0]} rank in the same round. Where ranks do not have a core each, the CPU time says what they could
gain. "Peak extra" is the most that the process of a rank took beside the model, new assignments and all that PyTorch and gloo
keep for themselves included; "bound" is what the library says that its tensors take at most. "x copy" is CPU time over that
of a copy of as many bytes; a core copies {copy.text()} GB/s here, read and written.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--base", action="store_true", help="only the first case")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE.text}")
    args = parser.parse_args(arguments)
    cases = [*CASES[: 1 if args.base else None], *([LARGE] if args.large else [])]
    made_by = provenance()
    found = measure(cases, args.ranks, args.rounds, args.seconds)
    text = page(cases, args.ranks, found, made_by)
    print(text)
    if args.folder is not None:
        spreads = {name: asdict(spread) for name, spread in ratios(cases, args.ranks, found).items()}
        write_results(NAME, {"provenance": made_by, "ratios": spreads, "turns": found}, text, args.folder)


if __name__ == "__main__":
    main()
