"""The nearest centroids by the native kernels: see ``nearest.cpp`` for how they are found.

Legend: N points, D dimensions, K centroids, G groups of S places for centroids, E = D + 1 moments.
"""

import ctypes
import math

import torch
from torch import Tensor

from cce_torchrec.native.build import usable

MAX_GROUPS = 64
MAX_BOUND_BYTES = 2**27  # of all points
_UP = 1 + 1e-6  # more than the rounding of a float32 sum


class NativeSearch:
    """Finds the nearest of centroids that may move from one call to the next, for points that stay.

    Bounds from earlier calls (4 bytes a point and group, 128 MiB at most) save most of the distances of the later ones;
    the result is that of a search without them.

    Args:
        points_ND: float32 [N, D].
        num_centroids: K.
        rounding: a float32 score |c|^2 - 2 x.c is wrong by at most this share of (|x| + |c|)^2.
        once: whether there will be one call only, which needs no bounds.
    """

    def __init__(
        self, loaded: ctypes.CDLL, points_ND: Tensor, num_centroids: int, *, rounding: float, once: bool
    ) -> None:
        self._loaded, self._points_ND, self._rounding, self._once = loaded, points_ND, rounding, once
        N, K, lanes = len(points_ND), num_centroids, loaded.cce_lanes()
        affordable = MAX_GROUPS if once else min(MAX_GROUPS, max(1, MAX_BOUND_BYTES // (4 * max(N, 1))))
        self._vectors = math.ceil(K / (lanes * affordable))
        self._groups = math.ceil(K / (lanes * self._vectors))
        stride = lanes * math.ceil(self._groups / lanes)
        self._bounds_NG = torch.empty(0, stride)
        self._drift_G = torch.zeros(stride)
        self._order_GS = torch.full((self._groups, self._vectors * lanes), -1, dtype=torch.int32)
        self._assignment_N = torch.empty(N, dtype=torch.int64)
        self._centroids_KD: Tensor | None = None

    @classmethod
    def build(
        cls, points_ND: Tensor, num_centroids: int, *, rounding: float, once: bool = False
    ) -> "NativeSearch | None":
        """A search, or ``None`` where there is no library, or for points it is not made for."""
        loaded = usable(points_ND) if points_ND.dtype == torch.float32 and num_centroids < 2**31 else None
        if loaded is None:
            return None
        return cls(loaded, points_ND.contiguous(), num_centroids, rounding=rounding, once=once)

    def nearest(self, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each point, int64 [N] (the lowest of equals), and the squared distance to it, [N].

        Raises:
            MemoryError: where the kernel could not get its buffers.
        """
        centroids_KD = centroids_KD.contiguous()
        fresh = self._centroids_KD is None
        if self._centroids_KD is None:
            order_K = torch.arange(len(centroids_KD), dtype=torch.int32)
            if not self._once:
                order_K = _in_groups(centroids_KD, self._order_GS.shape[1])
                self._bounds_NG = torch.empty(len(self._points_ND), len(self._drift_G))
            self._order_GS.view(-1)[: len(centroids_KD)] = order_K
        else:
            self._drift(centroids_KD, self._centroids_KD)
        self._centroids_KD = None if self._once else centroids_KD.clone()
        origin_D = centroids_KD.double().mean(dim=0).float()
        distance_N = torch.empty(len(self._points_ND))
        done = self._loaded.cce_nearest(
            self._points_ND.data_ptr(),
            *self._points_ND.shape,
            centroids_KD.data_ptr(),
            len(centroids_KD),
            origin_D.data_ptr(),
            self._order_GS.data_ptr(),
            self._groups,
            self._vectors,
            self._rounding,
            None if self._once else self._bounds_NG.data_ptr(),
            self._drift_G.data_ptr(),
            fresh,
            self._assignment_N.data_ptr(),
            distance_N.data_ptr(),
            torch.get_num_threads(),
        )
        if not done:
            raise MemoryError(f"no memory to find the nearest of {len(centroids_KD)} centroids.")
        return self._assignment_N.clone(), distance_N

    def _drift(self, new_KD: Tensor, old_KD: Tensor) -> None:
        """Let no bound of a group be higher than before by what its farthest-moving centroid moved."""
        moved_K = (new_KD.double() - old_KD.double()).square().sum(dim=1).sqrt()
        moved_GS = torch.where(self._order_GS >= 0, moved_K[self._order_GS.clamp(min=0)], 0)
        drift_G = self._drift_G[: self._groups]
        drift_G.copy_((drift_G + moved_GS.amax(dim=1)) * _UP)


def _in_groups(centroids_KD: Tensor, size: int) -> Tensor:
    """The numbers of all centroids, int32 [K], those near each other together: halves of halves along the widest axis."""
    K = len(centroids_KD)
    pieces, done = [torch.arange(K)], []
    while pieces:
        piece = pieces.pop()
        if len(piece) <= size:
            done.append(piece)
            continue
        rows = centroids_KD[piece]
        axis = int((rows.amax(dim=0) - rows.amin(dim=0)).argmax())
        piece = piece[rows[:, axis].argsort(stable=True)]
        half = size * math.ceil(len(piece) / size / 2)
        pieces += [piece[half:], piece[:half]]
    return torch.cat(done).to(torch.int32)


def add_moments(points_ND: Tensor, weights_N: Tensor, assignment_N: Tensor, moments_KE: Tensor) -> bool:
    """Add each point and a 1, times its weight, to the moments of its centroid.

    Args:
        points_ND: float32 [N, D].
        weights_N: float64 [N].
        assignment_N: int64 [N], in [0, K).
        moments_KE: float64 [K, D + 1], added to.

    Returns:
        Whether it was done: not where there is no library, or for tensors it is not made for.
    """
    loaded = usable(points_ND, weights_N, assignment_N, moments_KE) if points_ND.dtype == torch.float32 else None
    if loaded is None:
        return False
    loaded.cce_add_moments(
        points_ND.data_ptr(),
        *points_ND.shape,
        weights_N.data_ptr(),
        assignment_N.data_ptr(),
        moments_KE.data_ptr(),
    )
    return True
