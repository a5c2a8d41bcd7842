"""Weighted K-means in plain PyTorch: one loop for a CPU, a GPU, one process or many.

    minimise  sum_n w_n min_k |x_n - c_k|^2      over the centroids c_1 .. c_K

Every rank passes its own share of the points; what leaves a rank are the candidates of a seeding round and one sum an
iteration, through the :class:`~cce_torchrec.recluster.collectives.Collectives` it is given. The result does not depend on
how the points are split: random draws are hashes of (seed, round, point id), sums are float64, and the nearest centroid
is exact, so rounding in a matrix product cannot send a point elsewhere on another rank.

The nearest centroid is where the time goes. Per block of points (small enough to stay in cache) it is a matrix product and
a minimum in two levels: a vectorised ``amin`` over strided classes of centroids (arg-min kernels are several times slower
than ``amin`` on a CPU), then the arg-min of the few class minima and of the winning class. The same two small arrays
give the runner-up, hence a proof that rounding did not matter; the rare points without one are redone in float64. After
the first iteration most points stay where they are, and for those one ``amin`` over the other centroids is the proof.
``benchmarks/kmeans_assign.py`` times the alternatives.

Legend: N local points, D dimensions, K centroids, B points of a block, G x C classes of centroids (K padded to G * C),
M candidates, F freshly chosen centroids, E = D + 1 moments.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cce_torchrec.hashing import derive_seed, mix64
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives

_CPU_BLOCK_ELEMENTS = 2**20  # scores of a block and thread: 4 MiB of float32
_CUDA_BLOCK_ELEMENTS = 2**25
_BLOCKS_OF_A_CHUNK = 8


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


@torch.no_grad()
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
    ranks = LocalCollectives() if collectives is None else collectives
    with ranks.guard():
        _check_arguments(points_ND, num_centroids, point_ids_N, weights_N, num_iterations, initial_centroids_KD)
        dtype = torch.float64 if points_ND.dtype == torch.float64 else torch.float32
        points_ND = points_ND.detach().to(dtype)
        weights_N = points_ND.new_ones(len(points_ND)) if weights_N is None else weights_N.detach()
        weights_N = weights_N.to(points_ND.device, torch.float64)
    options = derive_seed(seed, num_iterations, tolerance, initial_centroids_KD is None)
    _check_together(points_ND, weights_N, num_centroids, options, ranks)
    share = _Share(points_ND=points_ND.contiguous(), ids_N=point_ids_N.to(points_ND.device), weights_N=weights_N)
    if initial_centroids_KD is not None:
        centroids_KD = initial_centroids_KD.detach().to(share.points_ND)
    else:
        centroids_KD = _seed_centroids(share, num_centroids, seed, ranks)
    return _lloyd(share, centroids_KD, seed, num_iterations, tolerance, ranks, block)


@torch.no_grad()
def assign_nearest(points_ND: Tensor, centroids_KD: Tensor, *, block: int | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every point, exactly; the lowest index among equals.

        assignment_n = argmin_k |x_n - c_k|^2

    Args:
        points_ND: [N, D] of a floating dtype; N may be 0.
        centroids_KD: [K, D], K at least 1.
        block: points whose K distances are held at a time: the extra memory is about ``4 * block * K`` bytes. Default:
            what fits a cache.

    Returns:
        The assignment, int64 [N], and the squared distance [N], computed from the difference of the two vectors, so
        that a point that equals its centroid has 0.

    Raises:
        ValueError: where the shapes do not match or there is no centroid.

    Example:
        >>> assign_nearest(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [4.0]]))
        (tensor([0, 1]), tensor([1., 0.]))
    """
    if points_ND.dim() != 2 or centroids_KD.dim() != 2 or points_ND.shape[1] != centroids_KD.shape[1]:
        raise ValueError(f"need [N, D] points and [K, D] centroids, got {points_ND.shape} and {centroids_KD.shape}.")
    if len(centroids_KD) == 0:
        raise ValueError("there are no centroids to assign points to: pass at least one row.")
    dtype = torch.float64 if points_ND.dtype == torch.float64 else torch.float32
    search = _Search(centroids_KD.to(points_ND.device, dtype), len(points_ND), block)
    assignment_N = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
    distance_N = torch.empty(len(points_ND), dtype=dtype, device=points_ND.device)
    with _true_float32(points_ND.device):
        for at in search.chunks(len(points_ND)):
            assignment_N[at], distance_N[at] = search.nearest(points_ND[at].to(dtype))
    return assignment_N, distance_N


# --- what a rank holds, and whether it may start ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Share:
    """This rank's points."""

    points_ND: Tensor
    ids_N: Tensor
    weights_N: Tensor  # float64


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


def _check_together(points_ND: Tensor, weights_N: Tensor, num_centroids: int, options: int, ranks: Collectives) -> None:
    """What the ranks can only see together; raises the same ValueError on all of them."""
    with ranks.guard():
        limit = math.sqrt(torch.finfo(points_ND.dtype).max / points_ND.shape[1]) / 16
        bad_points = int((~(points_ND.abs() < limit).all(dim=1)).sum())
        bad_weights = int((~((weights_N >= 0) & (weights_N < torch.inf))).sum())
        counts = [bad_points, bad_weights, int((weights_N > 0).sum()), len(points_ND)]
        same = [num_centroids, points_ND.shape[1], points_ND.dtype.itemsize, options]
        local = torch.tensor([counts + same])
    table = ranks.all_gather_rows(local)
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
        raise ValueError(f"nothing to cluster: {total} points on {ranks.world_size} rank(s), none of positive weight.")


# --- the nearest centroid --------------------------------------------------------------------------------------------


class _Search:
    """Finds the nearest of fixed centroids, block by block, in buffers it keeps."""

    def __init__(self, centroids_KD: Tensor, num_points: int, block: int | None) -> None:
        self._first_of_equals_K = _first_of_equals(centroids_KD)
        self._centroids_KD = centroids_KD[self._first_of_equals_K]
        self._num_centroids = len(centroids_KD)
        K, D = self._centroids_KD.shape
        dtype, device = centroids_KD.dtype, centroids_KD.device
        self._classes = K if K <= 32 else 16 * math.ceil(math.sqrt(K) / 16)
        self._groups = -(-K // self._classes)
        padding = self._groups * self._classes - K
        # Distances do not move with the origin, but float32 scores are sharper when it lies among the centroids.
        self._origin_D = self._centroids_KD.double().mean(dim=0).to(dtype)
        centred_KD = self._centroids_KD - self._origin_D
        norms_K = centred_KD.double().square().sum(dim=1).to(dtype)
        self._norms_K = pad(norms_K, (0, padding), value=torch.inf)
        self._centred_DK = pad(centred_KD, (0, 0, 0, padding)).T.contiguous()
        self._rounding = torch.finfo(dtype).eps / 2 * min(D + 3, 8 * math.sqrt(D))
        self._block = min(block or _default_block(K, device), max(num_points, 1))
        self._scores_BK = torch.empty(self._block, self._groups * self._classes, dtype=dtype, device=device)

    def chunks(self, N: int) -> Iterator[slice]:
        """Cuts N points in chunks for :meth:`nearest`, of several blocks each."""
        return _slices(N, _BLOCKS_OF_A_CHUNK * self._block)

    def nearest(self, points_ND: Tensor, guess_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each point of a chunk, int64 [N], and the squared distance to it, [N].

        ``guess_N`` changes nothing but the time: points whose guess is right skip the search for the index.
        """
        if len(self._first_of_equals_K) < self._num_centroids:
            guess_N = None  # its numbers are not those of the distinct centroids
        assignment_N, uncertain_N = self._by_scores(points_ND, guess_N)
        doubtful = uncertain_N.nonzero().squeeze(1)
        if len(doubtful):
            assignment_N[doubtful] = self._by_differences(points_ND[doubtful])
        nearest_ND = self._centroids_KD.index_select(0, assignment_N)
        return self._first_of_equals_K[assignment_N], nearest_ND.sub_(points_ND).square_().sum(dim=1)

    def _by_scores(self, points_ND: Tensor, guess_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """The arg-min of |c|^2 - 2 x.c, and where rounding may have decided it."""
        centred_ND = points_ND - self._origin_D
        # Either score is wrong by at most rounding * (|x| + |c|)^2, and |c| <= |x| + d: 16 |x|^2 + 4 d^2 covers both.
        slack_N = centred_ND.square().sum(dim=1).mul_(20 * self._rounding)
        assignment_N = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
        uncertain_N = torch.empty(len(points_ND), dtype=torch.bool, device=points_ND.device)
        for at in _slices(len(points_ND), self._block):
            scores_BK = self._scores_BK[: len(slack_N[at])]
            torch.addmm(self._norms_K, centred_ND[at], self._centred_DK, alpha=-2, out=scores_BK)
            if guess_N is None:
                assignment_N[at], uncertain_N[at] = self._winners(scores_BK, slack_N[at])
            else:
                assignment_N[at], uncertain_N[at] = self._confirm(scores_BK, slack_N[at], guess_N[at])
        return assignment_N, uncertain_N

    def _winners(self, scores_BK: Tensor, slack_B: Tensor) -> tuple[Tensor, Tensor]:
        """The arg-min of each row in two levels, and where the runner-up is too close to tell. Overwrites the scores."""
        scores_BGC = scores_BK.view(-1, self._groups, self._classes)
        minima_BC = scores_BGC.amin(dim=1)
        best_B1, class_B1 = minima_BC.min(dim=1, keepdim=True)
        winners_BG = scores_BGC.gather(2, class_B1[:, :, None].expand(-1, self._groups, 1)).squeeze(2)
        group_B1 = winners_BG.argmin(dim=1, keepdim=True)
        # The runner-up is the least of what remains in the winning class and of the other classes' minima.
        others_B = minima_BC.scatter_(1, class_B1, torch.inf).amin(dim=1)
        runner_up_B = torch.minimum(others_B, winners_BG.scatter_(1, group_B1, torch.inf).amin(dim=1))
        assignment_B = group_B1.mul_(self._classes).add_(class_B1).squeeze(1)
        return assignment_B, self._too_close(best_B1.squeeze(1), runner_up_B, slack_B)

    def _confirm(self, scores_BK: Tensor, slack_B: Tensor, guess_B: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_winners`, which is run on the rows alone where the guess is not the clear winner."""
        guess_B1 = guess_B[:, None]
        guessed_B1 = scores_BK.gather(1, guess_B1)
        scores_BK.scatter_(1, guess_B1, torch.inf)
        others_B = scores_BK.view(-1, self._groups, self._classes).amin(dim=1).amin(dim=1)
        uncertain_B = self._too_close(guessed_B1.squeeze(1), others_B, slack_B)
        assignment_B = guess_B.clone()
        open_ = uncertain_B.nonzero().squeeze(1)
        if len(open_):
            scores = scores_BK.index_select(0, open_).scatter_(1, guess_B1[open_], guessed_B1[open_])
            assignment_B[open_], uncertain_B[open_] = self._winners(scores, slack_B[open_])
        return assignment_B, uncertain_B

    def _too_close(self, best_B: Tensor, runner_up_B: Tensor, slack_B: Tensor) -> Tensor:
        return runner_up_B - best_B <= torch.add(slack_B, best_B, alpha=4 * self._rounding)

    def _by_differences(self, points_BD: Tensor) -> Tensor:
        """The arg-min of |x - c|^2 without the cancellation of the expanded square, in float64."""
        chunks = points_BD.split(max(1, _CPU_BLOCK_ELEMENTS // len(self._centroids_KD)))
        return torch.cat([_squared_distances(chunk, self._centroids_KD).argmin(dim=1) for chunk in chunks])


def _first_of_equals(rows_KD: Tensor) -> Tensor:
    """The positions of the distinct rows, each where it first occurs, in order."""
    distinct_KD, place_K = torch.unique(rows_KD, dim=0, return_inverse=True)
    position_K = torch.arange(len(rows_KD), device=rows_KD.device)
    if len(distinct_KD) == len(rows_KD):
        return position_K
    first_K = torch.full_like(position_K[: len(distinct_KD)], len(rows_KD))
    return first_K.scatter_reduce_(0, place_K, position_K, "amin").sort().values


def _squared_distances(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """|x - c|^2 of every pair from their differences, float64 [N, K]; equal vectors give exactly 0."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points_ND.double(), centroids_KD.double(), compute_mode=mode).square_()


def _slices(N: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, N, step))


def _default_block(num_centroids: int, device: torch.device) -> int:
    cpu_elements = _CPU_BLOCK_ELEMENTS * min(torch.get_num_threads(), 16)
    return max(64, (_CUDA_BLOCK_ELEMENTS if device.type == "cuda" else cpu_elements) // max(num_centroids, 32))


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever TF32 or autocast setting the training around us uses."""
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


# --- Lloyd's iterations ----------------------------------------------------------------------------------------------


def _lloyd(
    share: _Share,
    centroids_KD: Tensor,
    seed: int,
    num_iterations: int,
    tolerance: float,
    ranks: Collectives,
    block: int | None,
) -> KMeansResult:
    """Move each centroid to the mean of its points until that no longer helps."""
    objectives: list[float] = []
    num_refilled, just_refilled = 0, True
    assignment_N: Tensor | None = None
    while True:
        sums_KD, counts_K, objective, assignment_N, costs_N = _reduced_statistics(
            share, centroids_KD, assignment_N, ranks, block
        )
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
            found_FD = _draw(share, costs_N, centroids_KD, len(empty), (seed, "refill", iterations), ranks)
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
    share: _Share, centroids_KD: Tensor, guess_N: Tensor | None, ranks: Collectives, block: int | None
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """Sums [K, D], counts [K] and objective over all ranks; assignment and squared distances [N] of this rank.

    There is one all-reduce. It also counts the ranks whose local work raised, so hearing of a failure costs nothing.
    """
    K, D = centroids_KD.shape
    error: Exception | None = None
    packed = torch.zeros(K * (D + 1) + 2, dtype=torch.float64, device=centroids_KD.device)
    assignment_N, costs_N = share.ids_N[:0], share.weights_N[:0]
    try:
        assignment_N, costs_N = _local_statistics(share, centroids_KD, guess_N, packed, block)
    except Exception as raised:  # whatever it is, the other ranks must hear of it
        error = raised
        packed[-1] = 1
    packed = ranks.all_reduce_sum(packed)
    objective, num_failed = packed[-2:].tolist()
    if num_failed:
        ranks.agree(error)
    moments_KE = packed[:-2].view(K, D + 1)
    return moments_KE[:, :D], moments_KE[:, D], objective, assignment_N, costs_N


def _local_statistics(
    share: _Share, centroids_KD: Tensor, guess_N: Tensor | None, packed: Tensor, block: int | None
) -> tuple[Tensor, Tensor]:
    """Add this rank's weighted sums, counts and objective to ``packed``; return assignment and squared distances."""
    K, D = centroids_KD.shape
    moments_KE = packed[:-2].view(K, D + 1)
    assignment_N, costs_N = torch.empty_like(share.ids_N), torch.empty_like(share.weights_N)
    search = _Search(centroids_KD, len(costs_N), block)
    with _true_float32(centroids_KD.device):
        for at in search.chunks(len(costs_N)):
            guess = None if guess_N is None else guess_N[at]
            assignment_N[at], costs_N[at] = search.nearest(share.points_ND[at], guess)
            moments = pad(share.points_ND[at].double(), (0, 1), value=1.0).mul_(share.weights_N[at, None])
            moments_KE.index_add_(0, assignment_N[at], moments)
    packed[-2] = costs_N @ share.weights_N
    return assignment_N, costs_N


# --- drawing points with probability proportional to w |x - nearest centroid|^2 --------------------------------------


def _seed_centroids(share: _Share, K: int, seed: int, ranks: Collectives) -> Tensor:
    """k-means++ in rounds: each draws as many centroids as there are, by :func:`_draw`, from one set of distances."""
    points_ND = share.points_ND
    chosen_FD = points_ND[:0]
    costs_N = torch.ones_like(share.weights_N)
    exact = False
    for round_ in range(2 * K):
        wanted = min(K - len(chosen_FD), len(chosen_FD) + 1)
        found_FD = _draw(share, costs_N, chosen_FD, wanted, (seed, "seeding", round_), ranks)
        if len(found_FD):
            chosen_FD = torch.cat([chosen_FD, found_FD])
            if len(chosen_FD) == K:
                break
            new_costs_N = _costs_by_differences if exact else _costs_by_scores
            with ranks.guard():
                new_N = new_costs_N(points_ND, found_FD)
                costs_N = new_N if round_ == 0 else torch.minimum(costs_N, new_N)
        elif not exact:  # what is left lies within rounding of a centroid: see it in float64
            exact = True
            with ranks.guard():
                costs_N = _costs_by_differences(points_ND, chosen_FD)
        else:
            break
    repeats = torch.arange(K, device=points_ND.device) % len(chosen_FD)
    return chosen_FD[repeats]


def _costs_by_scores(points_ND: Tensor, centroids_FD: Tensor) -> Tensor:
    """min_f |x - c_f|^2 up to the rounding of a matrix product, float64 [N]."""
    F = len(centroids_FD)
    origin_D = centroids_FD.double().mean(dim=0).to(centroids_FD.dtype)
    centred_DF = (centroids_FD - origin_D).T.contiguous()
    norms_F = centred_DF.square().sum(dim=0)
    costs_N = torch.empty(len(points_ND), dtype=torch.float64, device=points_ND.device)
    block = _default_block(F, points_ND.device)
    with _true_float32(points_ND.device):
        for at in _slices(len(points_ND), block):
            centred_BD = points_ND[at] - origin_D
            scores_B = torch.addmm(norms_F, centred_BD, centred_DF, alpha=-2).amin(dim=1)
            costs_N[at] = scores_B.add_(centred_BD.square_().sum(dim=1)).clamp_(min=0)
    return costs_N


def _costs_by_differences(points_ND: Tensor, centroids_FD: Tensor) -> Tensor:
    """min_f |x - c_f|^2, exact and slow, float64 [N]; 1 where there are no centroids."""
    if len(centroids_FD) == 0 or len(points_ND) == 0:
        return torch.ones(len(points_ND), dtype=torch.float64, device=points_ND.device)
    chunks = points_ND.split(max(1, _CPU_BLOCK_ELEMENTS // len(centroids_FD)))
    return torch.cat([_squared_distances(chunk, centroids_FD).amin(dim=1) for chunk in chunks])


def _draw(
    share: _Share, costs_N: Tensor, centroids_KD: Tensor, wanted: int, key: tuple[object, ...], ranks: Collectives
) -> Tensor:
    """Up to ``wanted`` points of any rank, as sequential draws proportional to w * cost would pick them: [F, D].

    An exponential race: point n arrives at time E_n / (w_n cost_n), where E_n ~ Exp(1) is hashed from its id, and the
    first to arrive is picked. When a pick lowers the cost of another point, what is left of that one's wait grows by
    the same factor. Waits never shrink, so the picks are final up to the first arrival that was not gathered.
    """
    num_candidates = 2 * wanted + 16
    with ranks.guard():
        local = _local_candidates(share, costs_N, centroids_KD, num_candidates, key)
    words = ranks.all_gather_rows(local).cpu()
    ids_M = words[:, 0].contiguous()
    times_M, costs_M = words[:, 1:3].T.contiguous().view(torch.float64)
    points_MD = words[:, 3:].contiguous().view(torch.float64)
    by_id = ids_M.argsort()
    order = by_id[times_M[by_id].argsort(stable=True)][:num_candidates]
    times_M, costs_M, points_MD = times_M[order], costs_M[order], points_MD[order]
    horizon = float(times_M[-1]) if len(order) == num_candidates else math.inf
    picked: list[int] = []
    while len(order) and len(picked) < wanted:
        pick = int(times_M.argmin())
        now = float(times_M[pick])
        if now > horizon or now == math.inf:
            break
        picked.append(pick)
        lower_M = torch.minimum(costs_M, _squared_distances(points_MD[pick, None], points_MD)[0])
        times_M = torch.where(lower_M > 0, now + (times_M - now) * (costs_M / lower_M), torch.inf)
        costs_M = lower_M
    return points_MD[picked].to(share.points_ND)


def _local_candidates(
    share: _Share, costs_N: Tensor, centroids_KD: Tensor, count: int, key: tuple[object, ...]
) -> Tensor:
    """This rank's first ``count`` of the race as int64 words [M, 3 + D]: id, then the bits of key, cost and point.

    A few more than ``count`` are taken by the given costs, then ranked by exact ones, which no split can change.
    """
    race_N = _uniform(share.ids_N, key).log_().neg_()
    top = (race_N / (share.weights_N * costs_N)).topk(min(len(race_N), count + 16), largest=False).indices
    points_MD = share.points_ND[top]
    costs_M = _costs_by_differences(points_MD, centroids_KD)
    keys_M = race_N[top] / (share.weights_N[top] * costs_M)
    first = keys_M.argsort()[:count]
    first = first[keys_M[first] < torch.inf]
    columns = torch.cat([keys_M[first, None], costs_M[first, None], points_MD[first].double()], dim=1)
    return torch.cat([share.ids_N[top[first], None], columns.view(torch.int64)], dim=1)


def _uniform(ids_N: Tensor, key: tuple[object, ...]) -> Tensor:
    """Numbers in (0, 1), float64 [N], that are a function of ``key`` and the id alone."""
    bits_N = (mix64(ids_N ^ derive_seed("kmeans", *key)) >> 12) & (2**52 - 1)
    return (bits_N.double() + 0.5) * 2.0**-52
