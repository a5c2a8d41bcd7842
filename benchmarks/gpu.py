"""What the Triton kernels cost on a CUDA device, against what the device can do; first, whether they are right there.

    python -m benchmarks.gpu                    # needs num_tables * V * D * 4 bytes for full tables, 20 GiB as it is
    python -m benchmarks.gpu --quick            # small sizes, nothing written

Four questions. Are vectors, gradients and nearest centroids those of the CPU? How long is a forward, against the time to read
ids and assignments and write the output at the rate of a measured copy? How long is a step (forward, backward, optimizer),
against one of full tables by FBGEMM (or PyTorch, where FBGEMM has no CUDA)? How many operations a second does the
assignment step of a K-means do, against measured matrix products in float32 and TF32?
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.harness import Spread, ratio, take_turns, write_results
from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.gpu import takes
from cce_torchrec.gpu.dispatch import SWITCH
from cce_torchrec.methods import CCE
from cce_torchrec.recluster.nearest import assign_nearest, squared_distances, true_float32
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

NAME = "gpu"
SECTOR = 32  # bytes that a GPU reads at least
COPY, FORWARD, LOWERED, STEP, FULL = "copy", "CCE forward", "lowered CCE forward", "CCE step", "full step"
ASSIGN, FLOAT32, TF32 = "K-means assignment", "float32 product", "TF32 product"


@dataclass(frozen=True)
class Sizes:
    """Of what is measured; ``repeats``: of a piece of work in one turn."""

    num_tables: int = 4
    num_embeddings: int = 10_000_000
    dim: int = 128
    num_columns: int = 8
    num_rows: int = 1024
    batch_size: int = 65_536
    copied: int = 2**28  # floats
    points: int = 2**20
    centroids: int = 1024
    side: int = 8192  # of the matrices of a product
    repeats: int = 10
    rounds: int = 15


QUICK = Sizes(2, 5000, 32, 4, 100, 300, 2**12, 500, 60, 64, repeats=1, rounds=2)


def collection_of(sizes: Sizes, device: torch.device) -> CompressedEmbeddingBagCollection:
    """Compressed tables of one feature each; the same ones on every device."""
    method = CCE(num_rows=sizes.num_rows, num_columns=sizes.num_columns)
    tables = [
        CompressedEmbeddingBagConfig(
            name=f"t{t}", num_embeddings=sizes.num_embeddings, embedding_dim=sizes.dim, feature_names=[f"f{t}"],
            method=method,
        )
        for t in range(sizes.num_tables)
    ]  # fmt: skip
    collection = CompressedEmbeddingBagCollection(tables, device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return collection


def features_of(sizes: Sizes, longest: int) -> KeyedJaggedTensor:
    """Bags of as many ids at most, or of one each."""
    generator = torch.Generator().manual_seed(0)
    bags = sizes.num_tables * sizes.batch_size
    lengths = torch.randint(1 if longest == 1 else 0, longest + 1, (bags,), generator=generator)
    ids = torch.randint(0, sizes.num_embeddings, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor([f"f{t}" for t in range(sizes.num_tables)], ids, lengths=lengths)


def check(sizes: Sizes, device: torch.device) -> None:
    """Raise an ``AssertionError`` where the device does not get what the CPU gets without kernels."""
    cpu, features = torch.device("cpu"), features_of(sizes, longest=5)
    ours, lowered = collection_of(sizes, device), collection_of(sizes, cpu).double()  # float64 is left to PyTorch
    assert ours._fused(features.to(device)) is not None
    out, expected = ours(features.to(device)).values(), lowered(features).values()
    torch.testing.assert_close(out.cpu().double(), expected.double(), rtol=1e-4, atol=1e-4)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    out.backward(gradient.to(device))
    expected.backward(gradient.to(expected.dtype))
    for own, other in zip(ours.parameters(), lowered.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad.cpu().double(), other.grad.double(), rtol=1e-4, atol=1e-3)
    points_ND, centroids_KD = torch.randn(sizes.points, 16), torch.randn(sizes.centroids, 16)
    nearest_N = assign_nearest(points_ND.to(device), centroids_KD.to(device))[0].cpu()
    assert torch.equal(nearest_N, squared_distances(points_ND, centroids_KD).argmin(dim=1))


def turn(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of one of several pieces of work in a row, after one that is not counted."""
    work()
    waits = torch.cuda.synchronize if device.type == "cuda" else int
    waits()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    waits()
    return (time.perf_counter() - start) * 1e3 / repeats


def compressed_ways(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward alone, also by FBGEMM of rows; and a step with dense Adagrad."""
    collection, features = collection_of(sizes, device), features_of(sizes, longest=1).to(device)
    optimizer = torch.optim.Adagrad(collection.parameters(), lr=0.01)
    gradient = torch.randn(sizes.batch_size, sizes.num_tables * sizes.dim, device=device) / sizes.batch_size

    def step() -> None:
        optimizer.zero_grad()
        collection(features).values().backward(gradient)
        optimizer.step()

    return {
        FORWARD: torch.no_grad()(lambda: collection(features).values()),
        LOWERED: torch.no_grad()(lambda: collection._embedding_bag_collection(collection._rewrite(features)).values()),
        STEP: step,
    }


def full_way(sizes: Sizes, device: torch.device) -> tuple[str, Callable[[], object]]:
    """A step of full tables, and by what: FBGEMM with row-wise Adagrad in its backward, or PyTorch with Adagrad."""
    features = features_of(sizes, longest=1).to(device)
    gradient = torch.randn(sizes.batch_size, sizes.num_tables * sizes.dim, device=device) / sizes.batch_size
    shape = sizes.num_embeddings, sizes.dim
    if device.type == "cpu" or getattr(fbgemm_gpu, "__variant__", "cuda") != "cpu":
        place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        if device.type == "cuda":
            place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(*shape, *place)] * sizes.num_tables, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.01
        )
        return "FBGEMM", lambda: tables(features.values(), features.offsets()).backward(gradient)
    bags = [torch.nn.EmbeddingBag(*shape, mode="sum", sparse=True, device=device) for _ in range(sizes.num_tables)]
    optimizer = torch.optim.Adagrad([bag.weight for bag in bags], lr=0.01)
    ids = features.values().view(sizes.num_tables, -1, 1)

    def step() -> None:
        optimizer.zero_grad()
        torch.cat([bag(ids_B1) for bag, ids_B1 in zip(bags, ids, strict=True)], dim=1).backward(gradient)
        optimizer.step()

    return "PyTorch", step


def dense_ways(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], object]]:
    """A copy, products of square matrices, and the assignment step of a K-means."""
    source = torch.zeros(sizes.copied, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, sizes.side, sizes.side, device=device)
    points_ND = torch.randn(sizes.points, sizes.dim // sizes.num_columns, device=device)
    centroids_KD = torch.randn(sizes.centroids, points_ND.shape[1], device=device)

    def in_tf32() -> None:
        torch.set_float32_matmul_precision("high")
        torch.mm(left, right)
        torch.set_float32_matmul_precision("highest")

    return {
        COPY: lambda: target.copy_(source),
        FLOAT32: lambda: _in_float32(left, right),
        TF32: in_tf32,
        ASSIGN: lambda: assign_nearest(points_ND, centroids_KD),
    }


def _in_float32(left: Tensor, right: Tensor) -> None:
    with true_float32(left.device):
        torch.mm(left, right)


def measure(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Milliseconds of every way and turn, and what they say."""
    by, full = full_way(sizes, device)
    ways = {**dense_ways(sizes, device), **compressed_ways(sizes, device), FULL: full}
    turns = {name: lambda work=work: turn(work, device, sizes.repeats) for name, work in ways.items()}
    times = take_turns(turns, sizes.rounds)
    medians = {name: Spread.of(values).median for name, values in times.items()}
    ids = sizes.num_tables * sizes.batch_size
    moved = ids * (8 + 8 + SECTOR + 4 * sizes.dim)  # an id, an offset, its assignments, its vector
    rate = 8 * sizes.copied / medians[COPY]  # bytes a millisecond
    operations = 2 * sizes.points * sizes.centroids * (sizes.dim // sizes.num_columns) / medians[ASSIGN]
    return {
        "full_tables_by": by,
        "milliseconds": times,
        "gigabytes_a_second": rate / 1e6,
        "bytes_of_a_forward": moved,
        "forward_to_copy": medians[FORWARD] / (moved / rate),
        "step_to_full": ratio(times[STEP], times[FULL]).median,
        "assignment_to_float32": operations / (2 * sizes.side**3 / medians[FLOAT32]),
        "assignment_to_tf32": operations / (2 * sizes.side**3 / medians[TF32]),
    }


def page(sizes: Sizes, results: dict[str, Any], made_by: dict[str, Any]) -> str:
    """The results for people."""
    rows = [[name, Spread.of(values).text(3)] for name, values in results["milliseconds"].items()]
    goals = [
        ["forward, x the time to move its bytes", f"{results['forward_to_copy']:.2f}", "1.3 at most"],
        [f"step, x full tables by {results['full_tables_by']}", f"{results['step_to_full']:.2f}", "1.0 at most"],
        ["assignment, x float32 product", f"{results['assignment_to_float32']:.2f}", "0.5 at least"],
        ["assignment, x TF32 product", f"{results['assignment_to_tf32']:.2f}", ""],
    ]
    facts = ", ".join(f"{key} `{value}`" for key, value in {**asdict(sizes), **made_by}.items())
    return f"""# Triton kernels on a GPU

{markdown_table(["", "ms (quartiles)"], rows)}

{markdown_table(["", "measured", "goal"], goals)}

Bytes of a forward are ids, offsets, one sector of {SECTOR} bytes of assignments an id, and the output; the rate is that of a
copy ({results["gigabytes_a_second"]:.0f} GB/s, read and written). Medians of {sizes.rounds} turns.

Made by: {facts}.

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--num_tables", type=int, default=Sizes.num_tables)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device here, and this measures one: nothing was done.")
    os.environ[SWITCH] = "1"
    device = torch.device("cuda")
    if not takes(torch.zeros(1, device=device)):
        sys.exit("The Triton kernels cannot be used here: is Triton installed, and TRITON_INTERPRET not set?")
    check(replace(QUICK, batch_size=5000, points=50_000, centroids=1000), device)
    print("Vectors, gradients and nearest centroids are those of the CPU.")
    sizes = QUICK if args.quick else Sizes(num_tables=args.num_tables)
    made_by, results = provenance(), measure(sizes, device)
    text = page(sizes, results, made_by)
    print(text)
    if not args.quick:
        write_results(NAME, {"sizes": asdict(sizes), "provenance": made_by, **results}, text)


if __name__ == "__main__":
    main()
