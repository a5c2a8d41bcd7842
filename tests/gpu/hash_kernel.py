"""A kernel that does nothing but hash. Only for processes with Triton's interpreter."""

import triton
import triton.language as tl

from cce_torchrec.gpu.lookup_kernels import hashed


@triton.jit
def hash_kernel(job, ids, out, N: tl.constexpr, h: tl.constexpr):
    """out[n] = the h-th hash of ids[n]."""
    places_N = tl.arange(0, N)
    tl.store(out + places_N, hashed(job, tl.load(ids + places_N), h))
