"""How long a batch takes from ids to rows: by the native kernels and by PyTorch, in one run.

    python -m benchmarks.rewrite

One thread, whose processor time counts: unlike elapsed time it hardly depends on what else the machine does. The ids are
uniform, or Zipf: id v with a probability proportional to 1 / (v + 1). Every turn takes the next of several batches. The
bytes of a batch are its ids, their assignments and the rows that are written; they are set against a copy of as many bytes
in memory, in the same run.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import Spread, add_options, copying, ratio, take_turns, times_ceiling, write_results
from cce_torchrec import CompressedEmbeddingBagConfig
from cce_torchrec.lowering import lower_tables
from cce_torchrec.methods import CCE, CE, HashingTrick
from cce_torchrec.methods.base import RowMethod
from cce_torchrec.native import library, switched_off
from cce_torchrec.rewrite import RowRewriter
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed."""

    num_tables: int = 26
    batch_size: int = 4096
    num_embeddings: int = 1_000_000
    dim: int = 64
    num_rows: int = 1024
    rounds: int = 41


def methods(sizes: Sizes) -> dict[str, RowMethod]:
    """The methods that have a kernel."""
    return {
        "cce, c=4": CCE(num_rows=sizes.num_rows, num_columns=4),
        "cce, c=8": CCE(num_rows=sizes.num_rows, num_columns=8),
        "ce, c=4": CE(num_rows=sizes.num_rows, num_columns=4),
        "hashing trick": HashingTrick(num_rows=sizes.num_rows),
    }


def make_ids(sizes: Sizes, zipf: bool, generator: torch.Generator) -> Tensor:
    """Ids of one batch: uniform, or V^u for uniform u, less 1, which is Zipf."""
    uniform = torch.rand(sizes.num_tables * sizes.batch_size, generator=generator, dtype=torch.float64)
    V = sizes.num_embeddings
    return ((V + 1) ** uniform - 1 if zipf else V * uniform).long().clamp(max=V - 1)


class Rewrites:
    """Rewrites one batch after another."""

    def __init__(self, method: RowMethod, sizes: Sizes, zipf: bool) -> None:
        configs = [
            CompressedEmbeddingBagConfig(
                name=f"t{t}",
                num_embeddings=sizes.num_embeddings,
                embedding_dim=sizes.dim,
                feature_names=[f"f{t}"],
                method=method,
            )
            for t in range(sizes.num_tables)
        ]
        tables = lower_tables(configs, [None] * len(configs))
        self._rewrite = RowRewriter(
            tables, [name for table in tables for name in table.physical_names], False, BoundsCheckMode.FATAL
        )
        generator = torch.Generator().manual_seed(0)
        lengths = torch.ones(sizes.num_tables * sizes.batch_size, dtype=torch.int64)
        keys = [config.feature_names[0] for config in configs]
        self._batches = [
            KeyedJaggedTensor(keys, make_ids(sizes, zipf, generator), lengths=lengths) for _ in range(BATCHES)
        ]
        for batch in self._batches:
            batch.offset_per_key()  # the input distribution has computed them
        self._count = 0
        row_map = tables[0].row_map
        stored = len(row_map.columns) * row_map.assignments.element_size() if isinstance(method, CCE) else 0
        per_id = 8 + stored + 8 * len(row_map.columns) * row_map.rows_per_id
        self.bytes = sizes.num_tables * sizes.batch_size * per_id

    def turn(self) -> float:
        """Milliseconds of one batch; the one before it warms up."""
        self.next()
        start = time.thread_time()
        self.next()
        return 1e3 * (time.thread_time() - start)

    def next(self) -> Tensor:
        """The rows of the next batch."""
        self._count += 1
        return self._rewrite(self._batches[self._count % BATCHES]).values()


def in_pytorch(turn: Callable[[], float]) -> Callable[[], float]:
    """The same turn without the native kernels."""

    def switched() -> float:
        with switched_off():
            return turn()

    return switched


def measure(sizes: Sizes, seconds: float = float("inf")) -> dict[str, dict[str, Any]]:
    """Milliseconds, turn by turn, for every method and kind of ids."""
    results, cases = {}, 2 * len(methods(sizes))
    for name, method in methods(sizes).items():
        for zipf in (False, True):
            rewrites = Rewrites(method, sizes, zipf)
            with switched_off():
                expected = rewrites.next()
            rewrites._count -= 1
            assert torch.equal(rewrites.next(), expected)
            ways = {"native": rewrites.turn, "torch": in_pytorch(rewrites.turn), "copy": copying(time.thread_time)}
            times = take_turns(ways, sizes.rounds, seconds / cases)
            results[f"{name}, {'Zipf' if zipf else 'uniform'} ids"] = {"bytes": rewrites.bytes, **times}
    return results


def ceiling(result: dict[str, Any]) -> Spread:
    """Of the native kernels: to a copy of as many bytes."""
    return times_ceiling([ms / 1e3 for ms in result["native"]], result["bytes"], result["copy"])


def page(sizes: Sizes, results: dict[str, dict[str, Any]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["method and ids", "native ms (quartiles)", "torch ms", "native / torch", "MB moved", "x copy"]
    rows = [
        [
            name,
            Spread.of(result["native"]).text(2),
            Spread.of(result["torch"]).text(2),
            ratio(result["native"], result["torch"]).text(2),
            f"{result['bytes'] / 1e6:.1f}",
            ceiling(result).text(1),
        ]
        for name, result in results.items()
    ]
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# From ids to rows

{markdown_table(header, rows)}

{sizes.num_tables} tables of one feature, V={sizes.num_embeddings:,}, D={sizes.dim}, k={sizes.num_rows}, B={sizes.batch_size},
one id a bag; one thread. A turn is the processor time of one call of `RowRewriter`. All ways of a line took up to
{sizes.rounds} turns in one run, in an order that changed; ratios are between turns of the same round. In brackets: quartiles.
"MB moved": ids and assignments read, rows written; "copy" moves as many bytes in memory that no cache holds.

Made by: {facts}.

Raw numbers: [`rewrite.json`](rewrite.json).
"""


def main() -> None:
    """Measure, and record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = asdict(Sizes())
    add_options(parser, defaults.pop("rounds"))
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = vars(parser.parse_args())
    seconds, folder = args.pop("seconds"), args.pop("folder")
    sizes = Sizes(**args)
    torch.set_num_threads(1)
    if library() is None:
        raise SystemExit("There are no native kernels here (no C++ compiler, or CCE_TORCHREC_NATIVE=0).")
    made_by = provenance()
    results = measure(sizes, seconds)
    text = page(sizes, results, made_by)
    print(text)
    if folder is not None:
        spreads = {f"{name} / PyTorch": ratio(result["native"], result["torch"]) for name, result in results.items()}
        spreads |= {f"{name} / ceiling": ceiling(result) for name, result in results.items()}
        content = {"made_by": made_by, "sizes": asdict(sizes), "milliseconds": results}
        content["ratios"] = {name: asdict(spread) for name, spread in spreads.items()}
        write_results("rewrite", content, text, folder)


if __name__ == "__main__":
    main()
