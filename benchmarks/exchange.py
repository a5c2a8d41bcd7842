"""How long ranks of a re-clustering take to tell each other something over gloo: directly, or by gloo's own collectives.

    python -m benchmarks.exchange
    python -m benchmarks.exchange --ranks 4

Messages are those of a K-means iteration, the moments of four columns of 512 centroids, and the few numbers before each
message. Ranks have nothing else to do; all ways take turns in one run.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.harness import Spread, add_options, ratio, take_turns, write_results
from benchmarks.ranks import on_ranks
from cce_torchrec.recluster import collectives
from cce_torchrec.recluster.collectives import ProcessGroupCollectives
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "exchange"
CALLS = 50  # of a turn
MOMENTS = 4 * 512 * 17
WAYS = {"gloo's collectives": 0, "exchanged": collectives._EXCHANGED_BYTES}
MESSAGES = {
    "sum of 280 KB": lambda ranks: ranks.all_reduce_sum(torch.ones(MOMENTS, dtype=torch.float64)),
    "gather of 280 KB": lambda ranks: ranks.all_gather_rows(torch.ones(MOMENTS, dtype=torch.float64)),
    "agreement": lambda ranks: ranks.agree(),
}


def turn(say: Callable[[ProcessGroupCollectives], Any], largest: int) -> float:
    """Seconds a message."""
    with mock.patch.object(collectives, "_EXCHANGED_BYTES", largest):
        ranks = ProcessGroupCollectives()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(CALLS):
        say(ranks)
    return (time.perf_counter() - started) / CALLS


def run_rank(rounds: int, seconds: float) -> dict[str, list[float]]:
    """One rank's life: its turns, by message and way."""
    ways = {
        f"{message}, {way}": lambda say=say, largest=largest: turn(say, largest)
        for message, say in MESSAGES.items()
        for way, largest in WAYS.items()
    }
    return take_turns(ways, rounds, seconds)


def page(found: dict[str, list[float]], ratios: dict[str, Spread], ranks: int, made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["message", *(f"{way}, ms (quartiles)" for way in WAYS), "ratio"]
    rows = []
    for message in MESSAGES:
        times = [Spread.of([1e3 * value for value in found[f"{message}, {way}"]]).text(2) for way in WAYS]
        rows.append([message, *times, ratios[message].text(2)])
    facts = ", ".join(f"{name} `{value}`" for name, value in made_by.items())
    return f"""# What a message between ranks costs

{markdown_table(header, rows)}

{ranks} ranks on loopback, one thread each; {len(next(iter(found.values())))} turns of {CALLS} messages, in an order that
changed; times are those of rank 0, ratios are between turns of the same round. A sum or a gather includes the numbers that
are told before it.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=9)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args(arguments)
    made_by = provenance()
    found = on_ranks(args.ranks, run_rank, args.rounds, args.seconds)[0]
    slow, fast = WAYS
    ratios = {message: ratio(found[f"{message}, {fast}"], found[f"{message}, {slow}"]) for message in MESSAGES}
    text = page(found, ratios, args.ranks, made_by)
    print(text)
    if args.folder is not None:
        spreads = {name: asdict(spread) for name, spread in ratios.items()}
        write_results(NAME, {"provenance": made_by, "ratios": spreads, "turns": found}, text, args.folder)


if __name__ == "__main__":
    main()
