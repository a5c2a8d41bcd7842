"""Weighted K-means in plain PyTorch: one loop for a CPU, a GPU, one process or many.

    minimise  sum_n w_n min_k |x_n - c_k|^2      over the centroids c_1 .. c_K

Every rank passes its own share of the points; what leaves a rank are the candidates and picks of a seeding round and one sum
an iteration, through the :class:`~cce_torchrec.recluster.collectives.Collectives` it is given; fits that run together share
their messages. The result does not depend on how the points are split: random draws are hashes of (seed, round, point id),
sums are float64, and the nearest centroid is exact, so rounding in a matrix product cannot send a point elsewhere on another
rank.

Where centroids start is in ``seeding.py``; the nearest centroid, where the time goes, in ``nearest.py``.

Legend: N local points, D dimensions, K centroids, E = D + 1 moments.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cce_torchrec.hashing import derive_seed
from cce_torchrec.native.nearest import add_moments
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives
from cce_torchrec.recluster.nearest import Tracker, slices
from cce_torchrec.recluster.seeding import Share, draw, seed_centroids
from cce_torchrec.recluster.together import Rows, Steps, Sum, run_together

_MOMENTS_CHUNK = 1 << 14  # points whose float64 copies are held at a time


@dataclass(frozen=True, kw_only=True)
class KMeansResult:
    """What :func:`kmeans` found; the same on every rank.

    Attributes:
        centroids_KD: the centroids, in the dtype the distances were computed in.
        objective: sum of w_n |x_n - nearest centroid|^2 over all points of all ranks, for exactly these centroids.
        objectives: the objective before each update and at the end: ``objectives[-1] == objective``.
        iterations: updates of the centroids that were made.
        num_empty: centroids that are nearest to no point.
        num_refilled: how often a centroid without points was moved to a badly served point.
        converged: whether the loop stopped because the objective no longer improved.
    """

    centroids_KD: Tensor
    objective: float
    objectives: tuple[float, ...]
    iterations: int
    num_empty: int
    num_refilled: int
    converged: bool


def kmeans(
    points_ND: Tensor,
    num_centroids: int,
    *,
    seed: int,
    point_ids_N: Tensor,
    weights_N: Tensor | None = None,
    num_iterations: int = 25,
    tolerance: float = 1e-4,
    initial_centroids_KD: Tensor | None = None,
    collectives: Collectives | None = None,
    block: int | None = None,
) -> KMeansResult:
    """Cluster the points of all ranks; the result is the same on every rank and for every split of the points.

        c_k  <-  sum_{n nearest to k} w_n x_n / sum_{n nearest to k} w_n

    Where there are at most K distinct points, the seeding takes each of them exactly: the objective is 0, and the
    centroids left over repeat others. In an iteration, a centroid without points is moved to a point drawn with
    probability proportional to w_n |x_n - nearest centroid|^2.

    Args:
        points_ND: this rank's points, [N, D] of a floating dtype; N may differ between ranks and may be 0. Half
            precision is computed in float32.
        num_centroids: K.
        seed: the source of all randomness.
        point_ids_N: int64 [N], the global identity of each point, distinct over all ranks.
        weights_N: [N], at least 0; a point of weight 0 counts for nothing. Default: all 1.
        num_iterations: the largest number of updates; 0 returns the seeding.
        tolerance: stop when an update improves the objective by less than this share of it.
        initial_centroids_KD: [K, D], the same on every rank, instead of the seeding.
        collectives: how to reach the other ranks. Default: there are none.
        block: points whose K distances are held at a time. Default: what fits a cache.

    Returns:
        The centroids and how they were reached.

    Raises:
        ValueError: on every rank, where points or weights are not finite, a weight is negative, there is no point of
            positive weight on any rank, or the ranks pass different arguments.
        RuntimeError: on every rank, where another rank failed.

    Example:
        >>> points = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> kmeans(points, 2, seed=0, point_ids_N=torch.arange(4)).centroids_KD.flatten().sort().values
        tensor([0.1000, 5.1000])
    """
    steps = kmeans_steps(
        points_ND,
        num_centroids,
        seed=seed,
        point_ids_N=point_ids_N,
        weights_N=weights_N,
        num_iterations=num_iterations,
        tolerance=tolerance,
        initial_centroids_KD=initial_centroids_KD,
        block=block,
    )
    return run_together([steps], LocalCollectives() if collectives is None else collectives)[0]


def kmeans_steps(
    points_ND: Tensor,
    num_centroids: int,
    *,
    seed: int,
    point_ids_N: Tensor,
    weights_N: Tensor | None = None,
    num_iterations: int = 25,
    tolerance: float = 1e-4,
    initial_centroids_KD: Tensor | None = None,
    block: int | None = None,
) -> Steps[KMeansResult]:
    """:func:`kmeans` of the same arguments, for :func:`~cce_torchrec.recluster.together.run_together` with others."""
    _check_arguments(points_ND, num_centroids, point_ids_N, weights_N, num_iterations, initial_centroids_KD)
    dtype = torch.float64 if points_ND.dtype == torch.float64 else torch.float32
    points_ND = points_ND.detach().to(dtype)
    weights_N = points_ND.new_ones(len(points_ND)) if weights_N is None else weights_N.detach()
    weights_N = weights_N.to(points_ND.device, torch.float64)
    options = derive_seed(seed, num_iterations, tolerance, initial_centroids_KD is None)
    yield from _check_together(points_ND, weights_N, num_centroids, options)
    share = Share(points_ND=points_ND.contiguous(), ids_N=point_ids_N.to(points_ND.device), weights_N=weights_N)
    if initial_centroids_KD is not None:
        centroids_KD = initial_centroids_KD.detach().to(share.points_ND)
    else:
        centroids_KD = yield from seed_centroids(share, num_centroids, seed)
    return (yield from _lloyd(share, centroids_KD, seed, num_iterations, tolerance, block))


def _check_arguments(
    points_ND: Tensor,
    num_centroids: int,
    point_ids_N: Tensor,
    weights_N: Tensor | None,
    num_iterations: int,
    initial_centroids_KD: Tensor | None,
) -> None:
    """What one rank can see to be wrong with its own arguments."""
    if points_ND.dim() != 2 or points_ND.shape[1] == 0 or not points_ND.dtype.is_floating_point:
        raise ValueError(f"points must be floating [N, D], got {points_ND.dtype} {tuple(points_ND.shape)}.")
    if num_centroids < 1 or num_iterations < 0:
        raise ValueError(f"num_centroids={num_centroids} must be >= 1 and num_iterations={num_iterations} >= 0.")
    if point_ids_N.shape != points_ND.shape[:1] or point_ids_N.dtype != torch.int64:
        raise ValueError(f"need int64 [{len(points_ND)}] ids, got {point_ids_N.dtype} {tuple(point_ids_N.shape)}.")
    if weights_N is not None and weights_N.shape != points_ND.shape[:1]:
        raise ValueError(f"need [{len(points_ND)}] weights, one a point, got {tuple(weights_N.shape)}.")
    if initial_centroids_KD is not None and initial_centroids_KD.shape != (num_centroids, points_ND.shape[1]):
        expected = (num_centroids, points_ND.shape[1])
        raise ValueError(f"initial centroids must be {expected}, got {tuple(initial_centroids_KD.shape)}.")


def _check_together(points_ND: Tensor, weights_N: Tensor, num_centroids: int, options: int) -> Steps[None]:
    """What the ranks can only see together; raises the same ValueError on all of them."""
    limit = math.sqrt(torch.finfo(points_ND.dtype).max / points_ND.shape[1]) / 16
    bad_points = int((~(points_ND.abs() < limit).all(dim=1)).sum())
    bad_weights = int((~((weights_N >= 0) & (weights_N < torch.inf))).sum())
    counts = [bad_points, bad_weights, int((weights_N > 0).sum()), len(points_ND)]
    same = [num_centroids, points_ND.shape[1], points_ND.dtype.itemsize, options]
    table = yield Rows(torch.tensor([counts + same]))
    bad_points, bad_weights, usable, total = table[:, :4].sum(dim=0).tolist()
    options_name = "the digest of seed, num_iterations, tolerance and whether there are initial centroids"
    names = ("num_centroids", "the dimension of the points", "the bytes of their numbers", options_name)
    for name, values in zip(names, table[:, 4:].T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on all ranks, got {values} for ranks 0..{len(values) - 1}.")
    if bad_points:
        raise ValueError(
            f"{bad_points} of {total} points are not finite (or above {limit:.1e}, where squares overflow)."
        )
    if bad_weights:
        raise ValueError(f"{bad_weights} of {total} weights are negative or not finite.")
    if usable == 0:
        raise ValueError(f"nothing to cluster: {total} points on {len(table)} rank(s), none of positive weight.")


def _lloyd(
    share: Share,
    centroids_KD: Tensor,
    seed: int,
    num_iterations: int,
    tolerance: float,
    block: int | None,
) -> Steps[KMeansResult]:
    """Move each centroid to the mean of its points until that no longer helps."""
    objectives: list[float] = []
    num_refilled, just_refilled = 0, True
    tracker = Tracker(share.points_ND, len(centroids_KD), block)
    while True:
        sums_KD, counts_K, objective, costs_N = yield from _reduced_statistics(share, centroids_KD, tracker)
        empty_K = counts_K == 0
        gained_little = not just_refilled and objectives[-1] - objective <= tolerance * objectives[-1]
        converged = objective == 0 or gained_little
        iterations = len(objectives)
        objectives.append(objective)
        if converged or iterations == num_iterations:
            break
        empty = empty_K.nonzero().squeeze(1)
        just_refilled = False
        means_KD = (sums_KD / counts_K[:, None]).to(centroids_KD.dtype)
        moved_KD = torch.where(empty_K[:, None], centroids_KD, means_KD)
        if len(empty):
            found_FD = yield from draw(share, costs_N, centroids_KD, len(empty), (seed, "refill", iterations))
            moved_KD[empty[: len(found_FD)]] = found_FD
            just_refilled = len(found_FD) > 0
            num_refilled += len(found_FD)
        centroids_KD = moved_KD
    return KMeansResult(
        centroids_KD=centroids_KD,
        objective=objectives[-1],
        objectives=tuple(objectives),
        iterations=iterations,
        num_empty=int(empty_K.sum()),
        num_refilled=num_refilled,
        converged=converged,
    )


def _reduced_statistics(
    share: Share, centroids_KD: Tensor, tracker: Tracker
) -> Steps[tuple[Tensor, Tensor, float, Tensor]]:
    """Sums [K, D], counts [K] and objective over all ranks; squared distances [N] of this rank."""
    K, D = centroids_KD.shape
    packed = torch.zeros(K * (D + 1) + 1, dtype=torch.float64, device=centroids_KD.device)
    costs_N = _local_statistics(share, centroids_KD, tracker, packed)
    packed = yield Sum(packed)
    moments_KE = packed[:-1].view(K, D + 1)
    return moments_KE[:, :D], moments_KE[:, D], float(packed[-1]), costs_N


def _local_statistics(share: Share, centroids_KD: Tensor, tracker: Tracker, packed: Tensor) -> Tensor:
    """Add this rank's weighted sums, counts and objective to ``packed``; return the squared distances."""
    moments_KE = packed[:-1].view(len(centroids_KD), -1)
    assignment_N, distance_N = tracker.nearest(centroids_KD)
    if not add_moments(share.points_ND, share.weights_N, assignment_N, moments_KE):
        for at in slices(len(assignment_N), _MOMENTS_CHUNK):
            moments = pad(share.points_ND[at].double(), (0, 1), value=1.0).mul_(share.weights_N[at, None])
            moments_KE.index_add_(0, assignment_N[at], moments)
    costs_N = distance_N.double()
    packed[-1] = costs_N @ share.weights_N
    return costs_N
