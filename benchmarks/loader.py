"""Is the streaming loader faster than the model that it feeds? 13 dense and 26 sparse features, 4096 rows a batch.

    python -m benchmarks.loader                          # some minutes on 2 cores
    python -m benchmarks.loader --folder docs/results    # and write the results down
    python -m benchmarks.loader --quick                  # fewer rows, smaller batches and vectors

The data are generated and prepared first. Then three ways take turns in one process, for full tables and for CCE: all batches
of an epoch, from nothing to the last, without a model; training steps on batches that are in memory; and training steps on
batches as they are loaded. torch has one thread, as in the example; reading and shuffling have threads of their own.
"""

import argparse
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.harness import Spread, add_options, copying, ratio, take_turns, times_ceiling, write_results
from dlrm_example.budget import plan_tables
from dlrm_example.config import TrainConfig
from dlrm_example.data import ColumnChoice
from dlrm_example.data.generate import generate
from dlrm_example.data.prepare import prepare
from dlrm_example.data.prepare_config import PrepareConfig
from dlrm_example.data.prepared import PreparedDataset, open_prepared
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_LABEL, CRITEO_SPARSE
from dlrm_example.data.truth import Truth
from dlrm_example.distributed import World, process_group
from dlrm_example.model import build_model, build_optimizer, shard_model
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "loader"
METHODS = {"full": 1.0, "cce": 8.0}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    rows: int
    num_ids: int
    batch_size: int
    embedding_dim: int
    steps: int


FULL = Sizes(rows=1_500_000, num_ids=100_000, batch_size=4096, embedding_dim=32, steps=80)
QUICK = Sizes(rows=60_000, num_ids=1_000, batch_size=512, embedding_dim=16, steps=20)
COPY = "copy, s a byte"
ROW_BYTES = 4 * (1 + len(CRITEO_DENSE)) + (8 + 4) * len(CRITEO_SPARSE)  # label, dense features, ids and lengths


def main() -> None:
    """Measure, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    add_options(parser, rounds=5)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, process_group() as world:
        dataset = make_data(Path(folder), sizes)
        ways = {"loader": lambda: load(dataset, sizes)}
        for method, compression in METHODS.items():
            ways |= model_ways(dataset, method, compression, sizes, world)
        rates = take_turns({**ways, COPY: copying(time.perf_counter)}, args.rounds, args.seconds)
    content = {"sizes": asdict(sizes), "rows_a_second": rates, "made_by": provenance()}
    page = make_page(content)
    print(page)
    if args.folder is not None:
        spreads = {f"loader / {method}": ratio(rates["loader"], rates[in_memory(method)]) for method in METHODS}
        spreads["loader / ceiling"] = ceiling(rates["loader"], rates[COPY])
        content["ratios"] = {name: asdict(spread) for name, spread in spreads.items()}
        write_results(NAME, content, page, args.folder)


def in_memory(method: str) -> str:
    """The way that trains on batches in memory."""
    return f"{method}, batches in memory"


def ceiling(rates: list[float], copies: list[float]) -> Spread:
    """Times what it takes to read and write the rows once in memory."""
    return times_ceiling([1 / rate for rate in rates], 2 * ROW_BYTES, copies)


def make_data(folder: Path, sizes: Sizes) -> PreparedDataset:
    """Generated Parquet, prepared with vocabularies."""
    generate(Truth(num_ids=sizes.num_ids), str(folder / "logs"), rows=sizes.rows, days=1, format="parquet")
    prepare(
        PrepareConfig(
            input=(str(folder / "logs"),),
            out=str(folder / "prepared"),
            label_column=CRITEO_LABEL,
            dense_columns=CRITEO_DENSE,
            sparse_columns=CRITEO_SPARSE,
            dense_transform="log1p",
            val_fraction=0.01,
            test_fraction=0.01,
        )
    )
    return open_prepared(folder / "prepared", ColumnChoice())


def epochs(
    dataset: PreparedDataset, sizes: Sizes, limit: int | None = None
) -> Callable[[], tuple[int, Iterator[Batch]]]:
    """Gives the batches of another epoch, and their number, whenever it is called."""
    loader = dataset.loader("train", batch_size=sizes.batch_size, limit_batches=limit, shuffle_seed=1)
    numbers = itertools.count(1)
    return lambda: (len(loader), loader.epoch(next(numbers)))


def load(dataset: PreparedDataset, sizes: Sizes) -> float:
    """Rows a second of a whole epoch."""
    _, batches = epochs(dataset, sizes)()
    started = time.perf_counter()
    rows = sum(len(batch.labels) for batch in batches)
    return rows / (time.perf_counter() - started)


def model_ways(
    dataset: PreparedDataset, method: str, compression: float, sizes: Sizes, world: World
) -> dict[str, Callable[[], float]]:
    """Training on batches in memory, and as they are loaded: rows a second of each."""
    dim = sizes.embedding_dim
    config = TrainConfig(
        run_dir="",
        method=method,
        compression=compression,
        embedding_dim=dim,
        dense_arch_layer_sizes=(64, dim),
        batch_size=sizes.batch_size,
    )
    model = shard_model(build_model(plan_tables(dataset.info, config), dataset.info, config), config, world)
    pipeline = TrainPipelineSparseDist(model, build_optimizer(model, config), world.device, execute_all_batches=True)
    next_epoch = epochs(dataset, sizes, sizes.steps)
    kept = list(next_epoch()[1])

    def train(batches: Iterator[Batch], count: int) -> float:
        started, rows = time.perf_counter(), 0
        for _ in range(count):
            _, _, labels = pipeline.progress(batches)
            rows += len(labels)
        seconds = time.perf_counter() - started
        try:
            pipeline.progress(batches)  # the pipeline learns that the batches are at an end, and can be given others
        except StopIteration:
            return rows / seconds
        raise AssertionError("there were more batches than the loader said")

    def as_loaded() -> float:
        count, batches = next_epoch()
        return train(batches, count)

    return {
        in_memory(method): lambda: train(iter(kept), len(kept)),
        f"{method}, batches as loaded": as_loaded,
    }


def make_page(content: dict[str, Any]) -> str:
    """The table, and what it says."""
    sizes, rates = Sizes(**content["sizes"]), content["rows_a_second"]
    rows, notes = [], []
    for name, values in rates.items():
        if name == COPY:
            continue
        method = name.split(",")[0]
        base = rates.get(in_memory(method))
        rows.append(
            [name, Spread.of([value / 1000 for value in values]).text(0), ratio(values, base).text(2) if base else ""]
        )
    for method in METHODS:
        faster = ratio(rates["loader"], rates[in_memory(method)])
        loaded = ratio(rates[f"{method}, batches as loaded"], rates[in_memory(method)])
        verdict = (
            "as fast from the loader as from memory" if loaded.high >= 1 else "slower from the loader than from memory"
        )
        notes.append(
            f"* {method}: the loader alone makes {faster.text(1)} times the rows that the model takes; training is "
            f"{verdict}, {loaded.text(2)} times."
        )
    times = ceiling(rates["loader"], rates[COPY]).text(0)
    notes.append(
        f"* A row has {ROW_BYTES} bytes in a batch; the loader takes {times} times as long as a copy of them in memory."
    )
    made_by = ", ".join(f"{key} `{value}`" for key, value in content["made_by"].items())
    table = markdown_table(["way", "thousand rows/s (quartiles)", "x batches in memory"], rows)
    data = f"{sizes.rows:,} generated rows with {sizes.num_ids:,} ids a column, B={sizes.batch_size}, D={sizes.embedding_dim}"
    turns = len(rates[COPY])
    return f"""# The loader beside the model

{table}

13 dense and 26 sparse features, {data}, the example's layers, one
rank. All ways took {turns} turns in one run, in an order that changed; ratios are between turns of the same round. In
brackets: quartiles. A turn of the loader is an epoch from nothing to the last batch, one of a model {sizes.steps} steps, each
time from the beginning of an epoch. What is read while a model computes has the second core, as far as it is free.

{chr(10).join(notes)}

Made by: {made_by}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


if __name__ == "__main__":
    main()
