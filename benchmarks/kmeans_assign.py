"""How much processor time one K-means iteration takes, next to other ways to find the nearest centroid.

    python benchmarks/kmeans_assign.py --repeats 5

All ways run in turn, ``--repeats`` times, on one thread, and the least processor time of each is printed: unlike elapsed
time it hardly depends on what else the machine does. ``--threads 2`` adds the elapsed time of whole fits, which does.
The points are those of a random CCE column: the sum of a row of a codebook and a row of a helper codebook.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cce_torchrec.recluster import kmeans as module
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.seeding import Share, seed_centroids


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


def least_times(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least processor milliseconds of each way; the ways take turns."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            least[name] = min(least[name], 1e3 * (time.thread_time() - start))
    return least


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=131_072)
    parser.add_argument("--centroids", type=int, default=512)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    print(f"{args}, torch {torch.__version__}, {platform.processor() or platform.machine()}")

    torch.set_num_threads(1)
    N, K = args.points, args.centroids
    points_ND = cce_column(N, K, args.dim, seed=0)
    share = Share(points_ND=points_ND, ids_N=torch.arange(N), weights_N=torch.ones(N, dtype=torch.float64))
    ranks = LocalCollectives()
    centroids_KD = seed_centroids(share, K, 0, ranks)
    nearest_N, _ = assign_nearest(points_ND, centroids_KD)
    moved_N = torch.where(torch.arange(N) % 20 == 0, (nearest_N + 1) % K, nearest_N)
    times = least_times(
        {
            "cdist + argmin": lambda: by_cdist(points_ND, centroids_KD),
            "blocked addmm + argmin": lambda: by_argmin(points_ND, centroids_KD),
            "blocked addmm + amin (no index)": lambda: by_amin(points_ND, centroids_KD),
            "assign_nearest": lambda: assign_nearest(points_ND, centroids_KD),
            "first iteration": lambda: module._reduced_statistics(share, centroids_KD, None, ranks, None),
            "iteration in which 5% move": lambda: module._reduced_statistics(share, centroids_KD, moved_N, ranks, None),
            "seeding": lambda: seed_centroids(share, K, 0, ranks),
            "a fit of 25 iterations": lambda: kmeans(
                points_ND, K, seed=0, point_ids_N=share.ids_N, num_iterations=25, tolerance=0.0
            ),
        },
        args.repeats,
    )
    for name, milliseconds in times.items():
        print(f"{name:32s} {milliseconds:9.1f} ms   {milliseconds / times['cdist + argmin']:7.2f} x cdist + argmin")
    if args.threads:
        torch.set_num_threads(args.threads)
        for _ in range(args.repeats):
            start = time.perf_counter()
            for column in range(args.columns):
                kmeans(cce_column(N, K, args.dim, column), K, seed=0, point_ids_N=share.ids_N, tolerance=0.0)
            print(f"{args.columns} columns on {args.threads} threads: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
