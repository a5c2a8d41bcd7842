"""What a re-clustering costs the training that it interrupts, and the training that goes on beside it, in one run.

    python -m benchmarks.background               # some minutes
    python -m benchmarks.background --tables 1 --steps 200 --background_steps 120 --rounds 1

A turn trains a model for some steps on one thread: without any re-clustering, with one that training waits for, and with one
on another thread, for which there should be another core.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.harness import Spread, add_options, ratio, take_turns, write_results
from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ReclusterSchedule,
)
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "background"
NONE, WAITED_FOR, BESIDE = "no re-clustering", "training waits", "in the background"
V, K, COLUMNS, DIM, BATCH, NUM_BATCHES = 200_000, 512, 4, 64, 4096, 64
CONFIG = ReclusterConfig(num_iterations=25, tolerance=0.0)


@dataclass(frozen=True)
class Turn:
    """What one training took, in seconds."""

    total: float
    stalled: float
    step: float  # the median, of those that are watched
    clustering: float


class Model(nn.Module):
    """Tables and a network over their vectors."""

    def __init__(self, num_tables: int) -> None:
        super().__init__()
        self.collection = CompressedEmbeddingBagCollection(
            tables=[
                CompressedEmbeddingBagConfig(
                    name=f"t{index}",
                    num_embeddings=V,
                    embedding_dim=DIM,
                    feature_names=[f"f{index}"],
                    method=CCE(num_rows=K, num_columns=COLUMNS),
                )
                for index in range(num_tables)
            ]
        )
        self.over = nn.Sequential(nn.Linear(num_tables * DIM, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())
        self.last = nn.Linear(256, 1)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.last(self.over(self.collection(ids).values())).squeeze(1)


def train(num_tables: int, steps: int, schedule: ReclusterSchedule | None, watched: range) -> Turn:
    """The same training each time, but for the re-clustering."""
    torch.manual_seed(0)
    model = Model(num_tables)
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": 0.05})
    dense = [parameter for part in (model.over, model.last) for parameter in part.parameters()]
    optimizer = torch.optim.SGD(dense, lr=0.05)
    keys, lengths = [f"f{index}" for index in range(num_tables)], torch.ones(num_tables * BATCH, dtype=torch.int64)
    batches = [KeyedJaggedTensor(keys, torch.randint(V, (len(lengths),)), lengths=lengths) for _ in range(NUM_BATCHES)]
    labels = torch.randint(2, (BATCH,)).float()
    times, stalled, clustering = [], 0.0, 0.0
    started = time.perf_counter()
    for step in range(1, steps + 1):
        at = time.perf_counter()
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(batches[step % NUM_BATCHES]), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - at)
        report = None if schedule is None else schedule.step(step, model)
        if report is not None:
            stalled, clustering = report.stalled_seconds, report.seconds
    total = time.perf_counter() - started
    return Turn(total, stalled, Spread.of([times[step - 1] for step in watched]).median, clustering)


def page(turns: dict[str, list[Turn]], spreads: dict[str, Spread], sizes: str, made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = [
        "re-clustering", "training s (quartiles)", "x without", "stood still s", "of the training", "clustering s",
        "step ms meanwhile", "x without",
    ]  # fmt: skip
    rows = [
        [
            way,
            Spread.of([turn.total for turn in of]).text(),
            spreads[f"{way} / {NONE}, training"].text(2),
            Spread.of([turn.stalled for turn in of]).text(2),
            Spread.of([100 * turn.stalled / turn.total for turn in of]).text() + " %",
            Spread.of([turn.clustering for turn in of]).text(),
            Spread.of([1000 * turn.step for turn in of]).text(),
            spreads[f"{way} / {NONE}, step"].text(2),
        ]
        for way, of in turns.items()
    ]
    facts = ", ".join(f"{name} `{value}`" for name, value in made_by.items())
    return f"""# What a re-clustering costs training

{markdown_table(header, rows)}

{sizes}; V={V:,}, k={K}, c={COLUMNS}, D={DIM}, B={BATCH:,}, row-wise Adagrad, two layers over the vectors;
{CONFIG.num_iterations} iterations a column. Training has one thread, as has the re-clustering beside it. {len(turns[NONE])}
turns each, in an order that changed; "x without" is between turns of the same round. "Stood still" is the beginning, the wait
for what was not done, and the commit; "meanwhile" are the steps between these, or as many where training waits.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800, help="of a turn's training; a quarter are before it begins")
    parser.add_argument("--background_steps", type=int, default=500, help="after which it is committed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = args.steps // 4

    def schedule(background_steps: int) -> ReclusterSchedule:
        return ReclusterSchedule(
            total_steps=args.steps,
            count=1,
            stop_after_fraction=begin / args.steps,
            gradient_steps=20,
            background_steps=background_steps,
            config=CONFIG,
        )

    schedules = {NONE: None, WAITED_FOR: schedule(0), BESIDE: schedule(args.background_steps)}
    watched = range(begin + 1, begin + args.background_steps + 1)
    ways = {way: partial(train, args.tables, args.steps, schedule, watched) for way, schedule in schedules.items()}
    made_by = provenance()
    turns = take_turns(ways, args.rounds, args.seconds)
    spreads = {
        f"{way} / {NONE}, {kind}": ratio([pick(turn) for turn in of], [pick(turn) for turn in turns[NONE]])
        for way, of in turns.items()
        for kind, pick in (("training", attrgetter("total")), ("step", attrgetter("step")))
    }
    spreads |= {
        f"{way}, stood still / training": ratio([turn.stalled for turn in of], [turn.total for turn in of])
        for way, of in turns.items()
    }
    sizes = f"{args.tables} tables, {args.steps} steps, {args.background_steps} of them while it goes on"
    text = page(turns, spreads, sizes, made_by)
    print(text)
    if args.folder is not None:
        ratios = {name: asdict(spread) for name, spread in spreads.items()}
        raw = {way: [asdict(turn) for turn in of] for way, of in turns.items()}
        write_results(NAME, {"provenance": made_by, "ratios": ratios, "turns": raw}, text, args.folder)


if __name__ == "__main__":
    main()
