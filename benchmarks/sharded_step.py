"""Time and bytes of a sharded training step: compressed tables beside TorchRec's own collection, on two CPU ranks.

    python -m benchmarks.sharded_step                          # about 3 minutes on 2 cores
    python -m benchmarks.sharded_step --folder docs/results    # and write them down
    python -m benchmarks.sharded_step --quick                  # smaller sizes, few rounds

A step is forward (ids to rows included), backward and the row-wise Adagrad that is applied in backward, for tables of V ids
and D dims with one feature each. Every rank is a process with one thread. All ways take turns in one run; the time of a step
is that of the slowest rank.

Bytes are counted in that run, by wrapping the functions of ``torch.distributed``. What a collective sends a rank is what
its algorithm has to: the splits for other ranks (all-to-all), (W-1)/W of the input (reduce-scatter), (W-1) inputs
(all-gather), 2 (W-1)/W of the buffer (all-reduce).
"""

import argparse
import math
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.harness import Spread, add_options, copying, ratio, take_turns, times_ceiling, write_results
from benchmarks.models import Sizes, Way, build, memory_bytes
from benchmarks.ranks import on_ranks
from benchmarks.sent_bytes import CountBytes
from cce_torchrec.methods.encoding import smallest_int_dtype
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "sharded_step"
COPY = "copy, s a byte"


WAYS = {
    "plain TW": Way(False, "table_wise"),
    "plain RW": Way(False, "row_wise"),
    "compressed DP": Way(True, "data_parallel", "plain TW"),
    "compressed TW": Way(True, "table_wise", "plain TW"),
    "compressed CW": Way(True, "column_wise", "plain TW"),
    "compressed RW": Way(True, "row_wise", "plain RW"),
    "compressed, ids sharded": Way(True, "data_parallel", "plain RW", by_id=True),
}


def make_batches(sizes: Sizes, rank: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Ids and lengths, different on each rank."""
    generator = torch.Generator().manual_seed(rank)
    bags = sizes.num_tables * sizes.batch_size
    return [
        (
            torch.randint(0, sizes.num_embeddings, (bags * sizes.bag,), generator=generator),
            torch.full((bags,), sizes.bag, dtype=torch.int64),
        )
        for _ in range(count)
    ]


class Steps:
    """Trains one model over the batches, again and again."""

    def __init__(self, model: DistributedModelParallel, sizes: Sizes, rank: int) -> None:
        self._model, self._sizes = model, sizes
        self._keys = [f"f{t}" for t in range(sizes.num_tables)]
        self._batches = make_batches(sizes, rank)
        self._grad_BD = torch.randn(sizes.batch_size, sizes.num_tables * sizes.dim) / sizes.batch_size
        self._count = 0

    def step(self) -> None:
        """Forward, backward and optimizer, of a batch that nothing was computed of before."""
        ids, lengths = self._batches[self._count % len(self._batches)]
        self._count += 1
        self._model(KeyedJaggedTensor(self._keys, ids, lengths=lengths)).values().backward(self._grad_BD)

    def turn(self) -> float:
        """Milliseconds a step, over some steps in a row; one before them brings the model back into the caches."""
        self.step()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(self._sizes.steps):
            self.step()
        dist.barrier()
        return (time.perf_counter() - start) * 1e3 / self._sizes.steps


def count_step(steps: Steps) -> dict[str, int]:
    """Bytes sent in one step, by collective: the mean of all ranks."""
    with CountBytes() as count:
        steps.step()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, dict(count.sent))
    names = sorted({name for sent in of_ranks for name in sent})
    return {name: round(sum(sent.get(name, 0) for sent in of_ranks) / len(of_ranks)) for name in names}


def run_rank(
    sizes: Sizes, names: list[str], seconds: float
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """One rank's life: its milliseconds a step, turn by turn, and the bytes that were sent, for each way."""
    ways = {name: Steps(build(WAYS[name], sizes), sizes, dist.get_rank()) for name in names}
    for steps in ways.values():
        for _ in range(3):
            steps.step()
    sent = {name: count_step(steps) for name, steps in ways.items()}
    turns = {name: steps.turn for name, steps in ways.items()}
    return take_turns({**turns, COPY: copying(time.perf_counter)}, sizes.rounds, seconds), sent


def measure(
    sizes: Sizes, names: list[str], seconds: float = float("inf")
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Milliseconds a step, turn by turn, and bytes sent a step and rank, by collective; for each way."""
    of_ranks = on_ranks(sizes.ranks, run_rank, sizes, names, seconds)
    slowest = {
        name: [max(turn) for turn in zip(*(times[name] for times, _ in of_ranks), strict=True)]
        for name in [*names, COPY]
    }
    return slowest, of_ranks[0][1]


def ceiling(name: str, sizes: Sizes, times: dict[str, list[float]], sent: dict[str, dict[str, int]]) -> Spread:
    """Times what it takes to copy what a rank moves: in memory, and what it sends and receives."""
    num_bytes = memory_bytes(WAYS[name], sizes)["step"] + 2 * sum(sent[name].values())
    return times_ceiling([ms / 1e3 for ms in times[name]], num_bytes, times[COPY])


def expected_bytes(way: Way, sizes: Sizes) -> dict[str, float]:
    """Bytes a step and rank of pooled vectors and gradients alone, by formula; the count must come out close to it.

    W ranks, B a rank, F features of D dims, n ids a bag, R = 2 rows an id and column, c columns.
    """
    W, B, F, D, n = sizes.ranks, sizes.batch_size, sizes.num_tables, sizes.dim, sizes.bag
    others = (W - 1) / W
    pooled = others * B * F * 2 * D * 4
    ids = others * B * F * (n + 1) * 8  # and as many lengths
    codebooks = 2 * others * F * 2 * sizes.num_rows * D * 4
    if way.by_id:
        assignments = sizes.num_columns * torch.iinfo(smallest_int_dtype(sizes.num_rows)).bits // 8
        return {"ids": others * B * F * n * (8 + assignments), "pooled": 0, "gradients": codebooks}
    if way.sharding_type == "data_parallel":
        return {"ids": 0, "pooled": 0, "gradients": codebooks}
    if way.sharding_type in ("table_wise", "column_wise"):
        return {"ids": ids * (W if way.sharding_type == "column_wise" else 1), "pooled": pooled, "gradients": 0}
    rows_per_id = 2 * sizes.num_columns if way.compressed else 1
    features = F * (sizes.num_columns if way.compressed else 1)
    size = 4 if way.compressed else 8  # of a row or id, and of a length
    sent_ids = others * B * F * n * rows_per_id * size + (W - 1) * B * features * size
    return {"ids": sent_ids, "pooled": W * pooled, "gradients": 0}


def page(sizes: Sizes, times: dict[str, list[float]], sent: dict[str, dict[str, int]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["step", "ms (quartiles)", "x plain TW", "x plain RW", "MB sent a step and rank", "by formula", "x copy"]
    rows = [
        [
            name,
            Spread.of(times[name]).text(),
            *(ratio(times[name], times[base]).text(2) if base in times else "" for base in ("plain TW", "plain RW")),
            f"{sum(sent[name].values()) / 1e6:.2f}",
            f"{sum(expected_bytes(WAYS[name], sizes).values()) / 1e6:.2f}",
            ceiling(name, sizes, times, sent).text(1),
        ]
        for name in sent
    ]
    verdicts = []
    for name in sent:
        base = WAYS[name].base
        if base in times:
            assert base is not None
            spread = ratio(times[name], times[base])
            verdict = "not slower than" if spread.median <= 1 else "slower than"
            verdicts.append(f"* {name}: {verdict} {base}, {spread.text(2)} times its step.")
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    setting = (
        f"{sizes.ranks} ranks (gloo, one thread each), B={sizes.batch_size} a rank, {sizes.num_tables} tables of one "
        f"feature, {sizes.bag} id(s) a bag, D={sizes.dim}, V={sizes.num_embeddings:,}, CCE k={sizes.num_rows} "
        f"c={sizes.num_columns}."
    )
    return f"""# Cost of a sharded step

{markdown_table(header, rows)}

{setting}
A step is forward (ids to rows included), backward and row-wise Adagrad. All ways took {len(times[COPY])} turns of
{sizes.steps} steps in one run, in an order that changed; ratios are between turns of the same round. In brackets: quartiles.
TW: table_wise, CW: column_wise, RW: row_wise, DP: data_parallel; "ids sharded" is `assignment_placement="sharded"`.

{chr(10).join(verdicts)}

Bytes were counted in the run, by wrapping the functions of `torch.distributed`; the formula counts ids, lengths, pooled
vectors and gradients. "x copy" is against the time to copy the bytes that a rank must move: ids, assignments, rows and pooled
vectors in memory, and what it sends and receives.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=2048, help="examples a rank")
    parser.add_argument("--num_tables", type=int, default=26, help="tables, of one feature each")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--num_embeddings", type=int, default=100_000)
    parser.add_argument("--num_rows", type=int, default=1024, help="k of CCE (and as many helper rows)")
    parser.add_argument("--num_columns", type=int, default=4, help="c of CCE")
    parser.add_argument("--bag", type=int, default=1, help="ids a bag")
    add_options(parser, rounds=25)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds")
    args = parser.parse_args(arguments)
    if args.quick:
        small = {"batch_size": 256, "num_tables": 6, "num_embeddings": 5000, "num_rows": 256, "rounds": 3, "steps": 2}
        for name, value in small.items():
            setattr(args, name, min(value, getattr(args, name)))
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(arguments)
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes.__dataclass_fields__})
    made_by = provenance()
    times, sent = measure(sizes, args.ways, args.seconds)
    text = page(sizes, times, sent, made_by)
    print(text)
    for name in args.ways:
        counted, formula = sum(sent[name].values()), sum(expected_bytes(WAYS[name], sizes).values())
        if not math.isclose(counted, formula, rel_tol=0.05):
            print(f"NOTE: {name} sent {counted:,} bytes, by formula {formula:,.0f}: {sent[name]}")
    if args.folder is not None:
        content = {
            "sizes": asdict(sizes),
            "provenance": made_by,
            "ms_per_step": {name: asdict(Spread.of(values)) | {"turns": values} for name, values in times.items()},
            "ratios": {
                f"{name} / {base}": asdict(ratio(times[name], times[base]))
                for name in times
                for base in ("plain TW", "plain RW")
                if base in times and name != COPY
            }
            | {f"{name} / ceiling": asdict(ceiling(name, sizes, times, sent)) for name in sent},
            "bytes_sent_per_step_and_rank": {
                name: {"total": sum(sent[name].values()), "by_collective": sent[name]} for name in sent
            },
        }
        write_results(NAME, content, text, args.folder)


if __name__ == "__main__":
    main()
