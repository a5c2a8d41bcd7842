"""Time and bytes of a sharded training step: compressed tables beside TorchRec's own collection, on two CPU ranks.

    python -m benchmarks.sharded_step            # about 3 minutes on 2 cores
    python -m benchmarks.sharded_step --quick    # smaller sizes, few rounds, writes nothing

A step is forward (ids to rows included), backward and the row-wise Adagrad that is applied in backward, for tables of V ids
and D dims with one feature each. Every rank is a process with one thread. All ways take turns in one run; the time of a step
is that of the slowest rank.

Bytes are counted in that run, by wrapping the functions of ``torch.distributed``. What a collective sends a rank is what
its algorithm has to: the splits for other ranks (all-to-all), (W-1)/W of the input (reduce-scatter), (W-1) inputs
(all-gather), 2 (W-1)/W of the buffer (all-reduce).
"""

import argparse
import logging
import math
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.harness import RESULTS, Spread, ratio, take_turns, write_results
from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, get_sharders
from cce_torchrec.methods.assignments import AssignmentStorage
from cce_torchrec.methods.encoding import smallest_int_dtype
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "sharded_step"


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    ranks: int
    batch_size: int
    num_tables: int
    dim: int
    num_embeddings: int
    num_rows: int
    num_columns: int
    bag: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Way:
    """One way to train the tables, and the plain collection it is compared with."""

    compressed: bool
    sharding_type: str
    base: str | None = None
    by_id: bool = False
    storage: AssignmentStorage = field(default_factory=AssignmentStorage)  # of compressed ones


WAYS = {
    "plain TW": Way(False, "table_wise"),
    "plain RW": Way(False, "row_wise"),
    "compressed DP": Way(True, "data_parallel", "plain TW"),
    "compressed TW": Way(True, "table_wise", "plain TW"),
    "compressed RW": Way(True, "row_wise", "plain RW"),
    "compressed, ids sharded": Way(True, "data_parallel", "plain RW", by_id=True),
}


class Model(nn.Module):
    """A collection with a place in a model."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors."""
        return self.collection(features)


def build(way: Way, sizes: Sizes) -> DistributedModelParallel:
    """The sharded model of one way."""
    torch.manual_seed(0)
    meta = torch.device("meta")
    common = [
        {
            "name": f"t{t}",
            "num_embeddings": sizes.num_embeddings,
            "embedding_dim": sizes.dim,
            "feature_names": [f"f{t}"],
        }
        for t in range(sizes.num_tables)
    ]
    collection: CompressedEmbeddingBagCollection | EmbeddingBagCollection
    if way.compressed:
        method = CCE(num_rows=sizes.num_rows, num_columns=sizes.num_columns, **vars(way.storage))
        placement = "sharded" if way.by_id else "replicated"
        configs = [CompressedEmbeddingBagConfig(**c, method=method, assignment_placement=placement) for c in common]
        collection = CompressedEmbeddingBagCollection(configs, device=meta)
    else:
        collection = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**c) for c in common], device=meta)
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
    sharder = next(s for s in get_sharders() if s.module_type is type(collection))

    def place(physical_table: str) -> Any:
        if way.sharding_type == "data_parallel":
            return data_parallel()
        if way.sharding_type == "row_wise":
            return row_wise(compute_kernel="fused")
        owner = int(physical_table.split(":")[0].removeprefix("t")) % sizes.ranks
        return table_wise(rank=owner, compute_kernel="fused")

    plan = construct_module_sharding_plan(
        collection,
        {name: place(name) for name in sharder.shardable_parameters(collection)},
        sharder,
        local_size=sizes.ranks,
        world_size=sizes.ranks,
        device_type="cpu",
    )
    return DistributedModelParallel(
        Model(collection),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"collection": plan}),
        sharders=[sharder],
    )


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


class CountBytes:
    """A context in which the bytes that collectives have to send from this rank are counted, by collective."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._original: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "CountBytes":
        for name in ("all_to_all_single", "all_reduce", "reduce_scatter", "reduce_scatter_tensor"):
            self._wrap(name)
        for name in ("all_gather", "all_gather_into_tensor"):
            self._wrap(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._original.items():
            setattr(dist, name, function)

    def _wrap(self, name: str) -> None:
        original = getattr(dist, name)
        self._original[name] = original

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += sent_bytes(name, args, kwargs)
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def sent_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What one call of a collective sends from this rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    argument = {"all_reduce": ("tensor", 0), "reduce_scatter": ("input_list", 1)}.get(name, ("input", 1))
    if name == "all_gather":
        argument = ("tensor", 1)
    elif name == "all_gather_into_tensor":
        argument = ("input_tensor", 1)
    value = kwargs.get(argument[0], args[argument[1]] if len(args) > argument[1] else None)
    assert value is not None, f"{name} called in a way that is not counted: {list(kwargs)}"
    size = sum(t.numel() * t.element_size() for t in (value if isinstance(value, list) else [value]))
    if name == "all_to_all_single":
        splits = kwargs.get("input_split_sizes", args[3] if len(args) > 3 else None)
        return size * (ranks - 1) // ranks if not splits else size - size * splits[rank] // max(sum(splits), 1)
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "all_gather_into_tensor": ranks - 1}
    return round(size * share.get(name, (ranks - 1) / ranks))


def count_step(steps: Steps) -> dict[str, int]:
    """Bytes sent in one step, by collective: the mean of all ranks."""
    with CountBytes() as count:
        steps.step()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, dict(count.sent))
    names = sorted({name for sent in of_ranks for name in sent})
    return {name: round(sum(sent.get(name, 0) for sent in of_ranks) / len(of_ranks)) for name in names}


def run_rank(rank: int, port: int, sizes: Sizes, names: list[str], result: Any) -> None:
    """One rank's life."""
    quieten()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(sizes.ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(sizes.ranks)
    )
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=sizes.ranks)
    ways = {name: Steps(build(WAYS[name], sizes), sizes, rank) for name in names}
    for steps in ways.values():
        for _ in range(3):
            steps.step()
    sent = {name: count_step(steps) for name, steps in ways.items()}
    times = take_turns({name: steps.turn for name, steps in ways.items()}, sizes.rounds)
    of_ranks: list[Any] = [None] * sizes.ranks
    dist.all_gather_object(of_ranks, times)
    if rank == 0:
        slowest = {name: [max(turn) for turn in zip(*(t[name] for t in of_ranks), strict=True)] for name in names}
        result.put((slowest, sent))
    dist.barrier()
    dist.destroy_process_group()


def quieten() -> None:
    """What torchrec and fbgemm say about themselves."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def measure(sizes: Sizes, names: list[str]) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Milliseconds a step, turn by turn, and bytes sent a step and rank, by collective; for each way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, args=(port, sizes, names, result), nprocs=sizes.ranks)
    times, sent = result.get()
    return times, sent


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
    if way.sharding_type == "table_wise":
        return {"ids": ids, "pooled": pooled, "gradients": 0}
    rows_per_id = 2 * sizes.num_columns if way.compressed else 1
    features = F * (sizes.num_columns if way.compressed else 1)
    size = 4 if way.compressed else 8  # of a row or id, and of a length
    sent_ids = others * B * F * n * rows_per_id * size + (W - 1) * B * features * size
    return {"ids": sent_ids, "pooled": W * pooled, "gradients": 0}


def page(sizes: Sizes, times: dict[str, list[float]], sent: dict[str, dict[str, int]], made_by: dict[str, Any]) -> str:
    """The results for people."""
    header = ["step", "ms (quartiles)", "x plain TW", "x plain RW", "MB sent a step and rank", "by formula"]
    rows = [
        [
            name,
            Spread.of(times[name]).text(),
            *(ratio(times[name], times[base]).text(2) if base in times else "" for base in ("plain TW", "plain RW")),
            f"{sum(sent[name].values()) / 1e6:.2f}",
            f"{sum(expected_bytes(WAYS[name], sizes).values()) / 1e6:.2f}",
        ]
        for name in times
    ]
    verdicts = []
    for name in times:
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
A step is forward (ids to rows included), backward and row-wise Adagrad. All ways took {sizes.rounds} turns of
{sizes.steps} steps in one run, in an order that changed; ratios are between turns of the same round. In brackets: quartiles.
TW: table_wise, RW: row_wise, DP: data_parallel; "ids sharded" is `assignment_placement="sharded"`.

{chr(10).join(verdicts)}

Bytes were counted in the run, by wrapping the functions of `torch.distributed`; the formula counts ids, lengths, pooled
vectors and gradients.

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
    parser.add_argument("--rounds", type=int, default=25, help="turns of each way")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds, nothing written")
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
    times, sent = measure(sizes, args.ways)
    text = page(sizes, times, sent, made_by)
    print(text)
    for name in args.ways:
        counted, formula = sum(sent[name].values()), sum(expected_bytes(WAYS[name], sizes).values())
        if not math.isclose(counted, formula, rel_tol=0.05):
            print(f"NOTE: {name} sent {counted:,} bytes, by formula {formula:,.0f}: {sent[name]}")
    if not args.quick:
        content = {
            "sizes": asdict(sizes),
            "provenance": made_by,
            "ms_per_step": {name: asdict(Spread.of(values)) | {"turns": values} for name, values in times.items()},
            "ratios": {
                f"{name} / {base}": asdict(ratio(times[name], times[base]))
                for name in times
                for base in ("plain TW", "plain RW")
                if base in times
            },
            "bytes_sent_per_step_and_rank": {
                name: {"total": sum(sent[name].values()), "by_collective": sent[name]} for name in times
            },
        }
        write_results(NAME, content, text, args.folder)


if __name__ == "__main__":
    main()
