"""How much processor time K-means and a re-clustering take, with and without the native kernels, next to simpler ways.

    python -m benchmarks.kmeans_assign --repeats 5 --record

All ways run in turn, ``--repeats`` times, on one thread, and their processor time counts: unlike elapsed time it hardly
depends on what else the machine does. ``--threads 2`` adds the elapsed time of whole re-clusterings, which does. The
points are those of a random CCE column: the sum of a row of a codebook and a row of a helper codebook.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Spread, ratio, take_turns, write_results
from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ReclusterReport,
    recluster,
)
from cce_torchrec.methods import CCE
from cce_torchrec.native import library, switched_off
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.seeding import Share, seed_centroids
from cce_torchrec.recluster.together import run_together
from dlrm_example.provenance import provenance
from dlrm_example.report import markdown_table

BASE = "cdist + argmin"


def cce_column(N: int, K: int, D: int, seed: int) -> Tensor:
    """Points [N, D]: a row of one of two random codebooks each, added."""
    generator = torch.Generator().manual_seed(seed)
    return sum(torch.randn(K, D, generator=generator)[torch.randint(K, (N,), generator=generator)] for _ in range(2))


def by_cdist(points_ND: Tensor, centroids_KD: Tensor) -> None:
    """The one-liner."""
    for chunk in points_ND.split(16384):
        torch.cdist(chunk, centroids_KD).argmin(dim=1)


def by_argmin(points_ND: Tensor, centroids_KD: Tensor) -> None:
    """A matrix product and an arg-min in blocks that stay in cache; float32, so not exact."""
    norms_K, centroids_DK = centroids_KD.square().sum(dim=1), centroids_KD.T.contiguous()
    scores = torch.empty(2048, len(centroids_KD))
    for chunk in points_ND.split(2048):
        torch.addmm(norms_K, chunk, centroids_DK, alpha=-2, out=scores[: len(chunk)]).argmin(dim=1)


def by_amin(points_ND: Tensor, centroids_KD: Tensor) -> None:
    """The least that any such method does: the product and the value of the minimum, without the index."""
    norms_K, centroids_DK = centroids_KD.square().sum(dim=1), centroids_KD.T.contiguous()
    scores = torch.empty(2048, len(centroids_KD))
    for chunk in points_ND.split(2048):
        torch.addmm(norms_K, chunk, centroids_DK, alpha=-2, out=scores[: len(chunk)]).amin(dim=1)


def recluster_table(num_embeddings: int, K: int, D: int, columns: int) -> ReclusterReport:
    """Re-cluster a random table, 25 iterations a column."""
    method = CCE(num_rows=K, num_columns=columns)
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=D * columns, feature_names=["f"], method=method
    )
    torch.manual_seed(0)
    return recluster(
        CompressedEmbeddingBagCollection(tables=[table]),
        seed=0,
        config=ReclusterConfig(num_iterations=25, tolerance=0.0),
    )


def processor_time(way: Callable[[], object]) -> Callable[[], float]:
    """Processor milliseconds of all threads."""

    def timed() -> float:
        start = time.process_time()
        way()
        return 1e3 * (time.process_time() - start)

    return timed


def in_pytorch(way: Callable[[], object]) -> Callable[[], None]:
    """The same way without the native kernels."""

    def switched() -> None:
        with switched_off():
            way()

    return switched


def page(args: argparse.Namespace, times: dict[str, list[float]], error: float, made_by: dict[str, Any]) -> str:
    """The results for people."""
    rows = []
    for name, values in times.items():
        plain = times.get(f"{name}, in PyTorch")
        against = "" if plain is None else ratio(values, plain).text(2)
        rows.append([name, Spread.of(values).text(0), ratio(values, times[BASE]).text(2), against])
    facts = ", ".join(f"{key} `{value}`" for key, value in made_by.items())
    return f"""# Processor time of K-means

{markdown_table(["way", "ms (quartiles)", f"x {BASE}", "x PyTorch"], rows)}

{args.points:,} points, {args.centroids} centroids, {args.dim} dims; the first lines find the nearest centroid once.
A fit makes 25 iterations. The re-clustering is that of a random CCE table: V={args.embeddings:,}, k={args.centroids},
c={args.columns}, {args.dim} dims a column, 25 iterations; it leaves a relative squared error of {error:.3f}. One thread,
processor time; all ways took {args.repeats} turns in one run, in an order that changed, and ratios are between turns of the
same round.

Made by: {facts}.

Raw numbers: [`kmeans.json`](kmeans.json).
"""


def main() -> None:
    """Print the table, and record it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=131_072)
    parser.add_argument("--embeddings", type=int, default=200_000)
    parser.add_argument("--centroids", type=int, default=512)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write docs/results/kmeans.{json,md}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made_by = provenance()
    N, K = args.points, args.centroids
    points_ND, ids_N = cce_column(N, K, args.dim, seed=0), torch.arange(N)
    share = Share(points_ND=points_ND, ids_N=ids_N, weights_N=torch.ones(N, dtype=torch.float64))

    def seeding() -> torch.Tensor:
        return run_together([seed_centroids(share, K, 0)], LocalCollectives())[0]

    centroids_KD = seeding()
    ours: dict[str, Callable[[], object]] = {
        "assign_nearest": lambda: assign_nearest(points_ND, centroids_KD),
        "seeding": seeding,
        "a fit": lambda: kmeans(points_ND, K, seed=0, point_ids_N=ids_N, num_iterations=25, tolerance=0.0),
        "a re-clustering": lambda: recluster_table(args.embeddings, K, args.dim, args.columns),
    }
    ways: dict[str, Callable[[], object]] = {
        BASE: lambda: by_cdist(points_ND, centroids_KD),
        "blocked addmm + argmin": lambda: by_argmin(points_ND, centroids_KD),
        "blocked addmm + amin (no index)": lambda: by_amin(points_ND, centroids_KD),
    }
    for name, way in ours.items():
        ways[name] = way
        if library() is not None:
            ways[f"{name}, in PyTorch"] = in_pytorch(way)
    error = recluster_table(args.embeddings, K, args.dim, args.columns).tables[0].relative_squared_error
    times = take_turns({name: processor_time(way) for name, way in ways.items()}, args.repeats)
    text = page(args, times, error, made_by)
    print(text)
    if args.record:
        content = {"made_by": made_by, "args": vars(args), "relative_squared_error": error, "milliseconds": times}
        write_results("kmeans", content, text)
    if args.threads:
        torch.set_num_threads(args.threads)
        for _ in range(args.repeats):
            print(
                f"{args.threads} threads: {recluster_table(args.embeddings, K, args.dim, args.columns).seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
