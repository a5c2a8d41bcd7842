"""The two nearest of many centroids in Triton: a tiled matrix product that keeps no scores but the two least of each point.

    score(n, k) = |c_k|^2 - 2 x_n . c_k        in float32, products without TF32

Legend: N points, D dimensions, K centroids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 128
BLOCK_K = 64
BLOCK_D = 16


@triton.jit
def nearest_kernel(
    points,  # float32 [N, D]
    centroids,  # float32 [D, K]
    norms,  # float32 [K]
    nearest,  # int64 [N], written
    least,  # float32 [N], written: its score
    second,  # float32 [N], written: the least score of the others
    num_points,
    num_centroids,
    num_dims,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The lowest index wins among equal scores."""
    points_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_K = tl.arange(0, BLOCK_K)
    nearest_N = tl.zeros([BLOCK_N], dtype=tl.int32)
    least_N = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
    second_N = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
    for first in range(0, num_centroids, BLOCK_K):
        centroids_K = first + columns_K
        dots_NK = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for start in range(0, num_dims, BLOCK_D):
            dims_D = start + tl.arange(0, BLOCK_D)
            points_ND = tl.load(
                points + points_N[:, None] * num_dims + dims_D[None, :],
                mask=(points_N < num_points)[:, None] & (dims_D < num_dims)[None, :],
                other=0.0,
            )
            centroids_DK = tl.load(
                centroids + dims_D[:, None].to(tl.int64) * num_centroids + centroids_K[None, :],
                mask=(dims_D < num_dims)[:, None] & (centroids_K < num_centroids)[None, :],
                other=0.0,
            )
            dots_NK = tl.dot(points_ND, centroids_DK, dots_NK, input_precision="ieee")
        norms_K = tl.load(norms + centroids_K, mask=centroids_K < num_centroids, other=float("inf"))
        scores_NK = norms_K[None, :] - 2 * dots_NK
        here_N, column_N = tl.min(scores_NK, axis=1, return_indices=True)
        others_NK = tl.where(columns_K[None, :] == column_N[:, None], float("inf"), scores_NK)
        second_N = tl.minimum(second_N, tl.minimum(tl.min(others_NK, axis=1), tl.maximum(least_N, here_N)))
        nearest_N = tl.where(here_N < least_N, first + column_N, nearest_N)
        least_N = tl.minimum(least_N, here_N)
    tl.store(nearest + points_N, nearest_N.to(tl.int64), mask=points_N < num_points)
    tl.store(least + points_N, least_N, mask=points_N < num_points)
    tl.store(second + points_N, second_N, mask=points_N < num_points)


def two_least(points_ND: Tensor, centroids_DK: Tensor, norms_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centroid of the least score of each point, int64 [N], that score, and the least of the other centroids'.

    Args:
        points_ND: float32 [N, D], contiguous.
        centroids_DK: float32 [D, K], contiguous.
        norms_K: float32 [K], |c|^2; infinite ones are never chosen while there is another.
    """
    N, D = points_ND.shape
    nearest_N = torch.empty(N, dtype=torch.int64, device=points_ND.device)
    least_N, second_N = points_ND.new_empty(N), points_ND.new_empty(N)
    if N:
        with torch.cuda.device_of(points_ND):
            nearest_kernel[(triton.cdiv(N, BLOCK_N),)](
                points_ND, centroids_DK, norms_K, nearest_N, least_N, second_N,
                N, len(norms_K), D, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D,
            )  # fmt: skip
    return nearest_N, least_N, second_N
