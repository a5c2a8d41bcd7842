"""The nearest of many centroids, exactly and fast: where the time of a clustering goes.

On a CPU with a C++ compiler ``native/nearest.cpp`` finds them; otherwise, and on a GPU, this file does, there with a Triton
kernel for the scores where it is asked for (gpu/nearest.py). Per block of points
(small enough to stay in cache) it is a matrix product and a minimum in two levels: a vectorised ``amin`` over strided
classes of centroids (arg-min kernels are several times slower than ``amin`` on a CPU), then the arg-min of the few class
minima and of the winning class. The same two small arrays give the runner-up, hence a proof that rounding did not matter;
the rare points without one are redone in float64. After the first iteration of a fit most points stay where they are, and
for those one ``amin`` over the other centroids is the proof. ``benchmarks/kmeans_assign.py`` times the alternatives.

Legend: N points, D dimensions, K centroids, B points of a block, G x C classes of centroids (K padded to G * C).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from cce_torchrec.gpu import takes
from cce_torchrec.native.nearest import NativeSearch

CPU_BLOCK_ELEMENTS = 2**20  # scores of a block and thread: 4 MiB of float32
CUDA_BLOCK_ELEMENTS = 2**25
BLOCKS_OF_A_CHUNK = 8


def assign_nearest(points_ND: Tensor, centroids_KD: Tensor, *, block: int | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every point, exactly; the lowest index among equals.

        assignment_n = argmin_k |x_n - c_k|^2

    Args:
        points_ND: [N, D] of a floating dtype; N may be 0.
        centroids_KD: [K, D], K at least 1.
        block: points whose K distances are held at a time: the extra memory is about ``4 * block * K`` bytes. Default:
            what fits a cache. The native kernel holds bounds in place of distances, and has no use for it.

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
    points_ND = points_ND.to(torch.float64 if points_ND.dtype == torch.float64 else torch.float32)
    tracker = Tracker(points_ND, len(centroids_KD), block, once=True)
    return tracker.nearest(centroids_KD.to(points_ND))


class Tracker:
    """The nearest centroids of points that stay while the centroids move; what one call finds speeds up the next.

    By the native kernels where they are to be had, else by :class:`Search`: the result is the same.

    Args:
        points_ND: float32 or float64 [N, D].
        num_centroids: K.
        block: as that of :func:`assign_nearest`.
        once: whether there will be one call only, so that nothing need be kept for the next.
    """

    def __init__(self, points_ND: Tensor, num_centroids: int, block: int | None, *, once: bool = False) -> None:
        self._points_ND, self._block, self._once = points_ND, block, once
        self._guess_N: Tensor | None = None
        rounding = score_rounding(points_ND.dtype, points_ND.shape[1])
        self._native = None
        if not _by_triton(points_ND):
            self._native = NativeSearch.build(points_ND, num_centroids, rounding=rounding, once=once)

    def nearest(self, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of K centroids for each point, int64 [N], and the squared distance to it, [N]."""
        if self._native is not None:
            return self._native.nearest(centroids_KD)
        points_ND, guess_N = self._points_ND, self._guess_N
        search = Search(centroids_KD, len(points_ND), self._block)
        assignment_N = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
        distance_N = torch.empty(len(points_ND), dtype=points_ND.dtype, device=points_ND.device)
        with true_float32(points_ND.device):
            for at in search.chunks(len(points_ND)):
                guess = None if guess_N is None else guess_N[at]
                assignment_N[at], distance_N[at] = search.nearest(points_ND[at], guess)
        self._guess_N = None if self._once else assignment_N
        return assignment_N, distance_N


def score_rounding(dtype: torch.dtype, num_dims: int) -> float:
    """The share of (|x| + |c|)^2 that a score |c|^2 - 2 x.c is wrong by at most."""
    return torch.finfo(dtype).eps / 2 * min(num_dims + 3, 8 * math.sqrt(num_dims))


class Search:
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
        self._rounding = score_rounding(dtype, D)
        self._block = min(block or default_block(K, device), max(num_points, 1))
        self._by_triton = _by_triton(centroids_KD)
        held = 0 if self._by_triton else self._block
        self._scores_BK = torch.empty(held, self._groups * self._classes, dtype=dtype, device=device)

    def chunks(self, N: int) -> Iterator[slice]:
        """Cuts N points in chunks for :meth:`nearest`, of several blocks each."""
        return slices(N, BLOCKS_OF_A_CHUNK * self._block)

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
        if self._by_triton:
            from cce_torchrec.gpu.nearest import two_least

            assignment_N, least_N, second_N = two_least(centred_ND, self._centred_DK, self._norms_K)
            return assignment_N, self._too_close(least_N, second_N, slack_N)
        assignment_N = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
        uncertain_N = torch.empty(len(points_ND), dtype=torch.bool, device=points_ND.device)
        for at in slices(len(points_ND), self._block):
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
        chunks = points_BD.split(max(1, CPU_BLOCK_ELEMENTS // len(self._centroids_KD)))
        return torch.cat([squared_distances(chunk, self._centroids_KD).argmin(dim=1) for chunk in chunks])


def _by_triton(points_ND: Tensor) -> bool:
    return points_ND.dtype == torch.float32 and takes(points_ND.contiguous())


def _first_of_equals(rows_KD: Tensor) -> Tensor:
    """The positions of the distinct rows, each where it first occurs, in order."""
    distinct_KD, place_K = torch.unique(rows_KD, dim=0, return_inverse=True)
    position_K = torch.arange(len(rows_KD), device=rows_KD.device)
    if len(distinct_KD) == len(rows_KD):
        return position_K
    first_K = torch.full_like(position_K[: len(distinct_KD)], len(rows_KD))
    return first_K.scatter_reduce_(0, place_K, position_K, "amin").sort().values


def squared_distances(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """|x - c|^2 of every pair from their differences, float64 [N, K]; equal vectors give exactly 0."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points_ND.double(), centroids_KD.double(), compute_mode=mode).square_()


def slices(N: int, step: int) -> Iterator[slice]:
    """0 .. N in slices of at most ``step``."""
    return (slice(start, start + step) for start in range(0, N, step))


def default_block(num_centroids: int, device: torch.device) -> int:
    """Points whose scores are held at a time."""
    cpu_elements = CPU_BLOCK_ELEMENTS * min(torch.get_num_threads(), 16)
    return max(64, (CUDA_BLOCK_ELEMENTS if device.type == "cuda" else cpu_elements) // max(num_centroids, 32))


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
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
