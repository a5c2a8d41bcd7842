"""Drawing points with probability proportional to w |x - nearest centroid|^2: how centroids start and are refilled.

Draws are exponential races: the point with the smallest E / (w d^2) wins, where E ~ Exp(1) is a hash of (seed, round, point
id), so that the winners do not depend on which rank holds which point.

Legend: N local points, D dimensions, K centroids, M candidates, F freshly chosen centroids.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cce_torchrec.hashing import derive_seed, mix64
from cce_torchrec.recluster.nearest import (
    CPU_BLOCK_ELEMENTS,
    default_block,
    slices,
    squared_distances,
    true_float32,
)
from cce_torchrec.recluster.together import Once, Rows, Steps

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's points."""

    points_ND: Tensor
    ids_N: Tensor
    weights_N: Tensor  # float64


def seed_centroids(share: Share, K: int, seed: int) -> Steps[Tensor]:
    """k-means++ in rounds: each draws as many centroids as there are, by :func:`draw`, from one set of distances."""
    points_ND = share.points_ND
    chosen_FD = points_ND[:0]
    costs_N = torch.ones_like(share.weights_N)
    exact = False
    for round_ in range(2 * K):
        wanted = min(K - len(chosen_FD), len(chosen_FD) + 1)
        found_FD = yield from draw(share, costs_N, chosen_FD, wanted, (seed, "seeding", round_))
        if len(found_FD):
            chosen_FD = torch.cat([chosen_FD, found_FD])
            if len(chosen_FD) == K:
                break
            new_costs_N = _costs_by_differences if exact else _costs_by_scores
            new_N = new_costs_N(points_ND, found_FD)
            costs_N = new_N if round_ == 0 else torch.minimum(costs_N, new_N)
        elif not exact:  # what is left lies within rounding of a centroid: see it in float64
            exact = True
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
    block = default_block(F, points_ND.device)
    with true_float32(points_ND.device):
        for at in slices(len(points_ND), block):
            centred_BD = points_ND[at] - origin_D
            scores_B = torch.addmm(norms_F, centred_BD, centred_DF, alpha=-2).amin(dim=1)
            costs_N[at] = scores_B.add_(centred_BD.square_().sum(dim=1)).clamp_(min=0)
    return costs_N


def _costs_by_differences(points_ND: Tensor, centroids_FD: Tensor) -> Tensor:
    """min_f |x - c_f|^2, exact and slow, float64 [N]; 1 where there are no centroids."""
    if len(centroids_FD) == 0 or len(points_ND) == 0:
        return torch.ones(len(points_ND), dtype=torch.float64, device=points_ND.device)
    chunks = points_ND.split(max(1, CPU_BLOCK_ELEMENTS // len(centroids_FD)))
    return torch.cat([squared_distances(chunk, centroids_FD).amin(dim=1) for chunk in chunks])


def draw(share: Share, costs_N: Tensor, centroids_KD: Tensor, wanted: int, key: tuple[object, ...]) -> Steps[Tensor]:
    """Up to ``wanted`` points of any rank, as sequential draws proportional to w * cost would pick them: [F, D].

    An exponential race: point n arrives at time E_n / (w_n cost_n), where E_n ~ Exp(1) is hashed from its id, and the
    first to arrive is picked. When a pick lowers the cost of another point, what is left of that one's wait grows by
    the same factor. Waits never shrink, so the picks are final up to the first arrival that was not gathered.
    """
    num_candidates = 2 * wanted + 16
    words_MX = yield Rows(_local_candidates(share, costs_N, centroids_KD, num_candidates, key).cpu())
    picked_F1 = yield Once(partial(_pick, words_MX, wanted, num_candidates))
    return words_MX[picked_F1[:, 0], 3:].view(torch.float64).to(share.points_ND)


def _pick(words_MX: Tensor, wanted: int, num_candidates: int) -> Tensor:
    """Which of all ranks' candidates :func:`draw` picks, int64 [F, 1]; they come in any order."""
    ids_M = words_MX[:, 0].contiguous()
    times_M, costs_M = words_MX[:, 1:3].T.contiguous().view(torch.float64)
    points_MD = words_MX[:, 3:].contiguous().view(torch.float64)
    by_id = ids_M.argsort()
    order = by_id[times_M[by_id].argsort(stable=True)][:num_candidates]
    picked = _race(points_MD[order].numpy(), times_M[order].numpy(), costs_M[order].numpy(), wanted, num_candidates)
    return order[picked][:, None]


def _race(points_MD: Array, times_M: Array, costs_M: Array, wanted: int, num_candidates: int) -> list[int]:
    """The picks of :func:`draw` among candidates in the order of their times, float64.

    In NumPy: it is a thousand small steps, of which each takes PyTorch three times as long.
    """
    horizon = times_M[-1] if len(times_M) == num_candidates else math.inf
    picked: list[int] = []
    while len(times_M) and len(picked) < wanted:
        pick = int(times_M.argmin())
        now = times_M[pick]
        if now > horizon or now == math.inf:
            break
        picked.append(pick)
        lower_M = np.minimum(costs_M, _to_candidates(points_MD[pick], points_MD))
        with np.errstate(divide="ignore", invalid="ignore"):  # of those that nothing is left of
            times_M = np.where(lower_M > 0, now + (times_M - now) * (costs_M / lower_M), np.inf)
        costs_M = lower_M
    return picked


def _to_candidates(point_D: Array, points_MD: Array) -> Array:
    """|x - c|^2 of one candidate and all, from their differences; exactly 0 for equal ones."""
    differences_MD = points_MD - point_D
    squares_M: Array = np.einsum("md,md->m", differences_MD, differences_MD)
    return squares_M


def _local_candidates(
    share: Share, costs_N: Tensor, centroids_KD: Tensor, count: int, key: tuple[object, ...]
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
