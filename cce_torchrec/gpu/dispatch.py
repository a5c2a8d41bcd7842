"""Which kernels do the work for tensors of a device: C++ on a CPU, Triton on CUDA where it is asked for.

    CCE_TORCHREC_TRITON=1    use the Triton kernels for CUDA tensors
    TRITON_INTERPRET=1       Triton's own: its interpreter runs them, here for CPU tensors, which is for tests

Both are read once a process. Whatever is not taken is left to PyTorch and FBGEMM, as without kernels.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torch.nn import Parameter

from cce_torchrec.native.build import library
from cce_torchrec.native.lookup import FusedLookup, LookupTable
from cce_torchrec.native.stores import Store

if TYPE_CHECKING:
    from cce_torchrec.gpu.lookup import TritonLookup

logger = logging.getLogger(__name__)

SWITCH = "CCE_TORCHREC_TRITON"


@functools.cache
def _device_type() -> str | None:
    """The type of device whose tensors the Triton kernels take; ``None`` where they are off or cannot be had."""
    if os.environ.get(SWITCH, "0") != "1":
        return None
    try:
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning("%s=1, but Triton cannot be imported; the kernels are not used. %s", SWITCH, error)
        return None
    return "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"


def takes(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can be used for these tensors: contiguous ones of one device of theirs."""
    if _device_type() is None or torch.compiler.is_compiling():
        return False
    device = tensors[0].device
    return device.type == _device_type() and all(
        type(t) in (Tensor, Parameter) and t.device == device and t.is_contiguous() for t in tensors
    )


def can_look_up(weights: Tensor) -> bool:
    """Whether there are kernels for lookups in such weights."""
    return takes(weights) or (weights.is_cpu and library() is not None)


class Lookup:
    """Ids to pooled vectors, by the kernels of the device they are on.

    Args:
        tables: what is looked up; at least one.
        num_features: F, of a batch, those of other tables included.
        width: W, of the output.
        store: weights, and how they are trained.
        mode: what happens to ids out of bounds.
    """

    def __init__(
        self, tables: Sequence[LookupTable], num_features: int, width: int, store: Store, mode: BoundsCheckMode
    ) -> None:
        self._made_of = (tables, num_features, width, store)
        self._mode = mode
        self._native = FusedLookup(*self._made_of)

    @functools.cached_property
    def _triton(self) -> "TritonLookup":
        from cce_torchrec.gpu.lookup import TritonLookup  # Triton is not there everywhere

        return TritonLookup(*self._made_of, self._mode)

    def __call__(self, ids_N: Tensor, offsets: Tensor, sample_weights_N: Tensor | None) -> Tensor | None:
        """Pooled vectors, float32 [B, W]; ``None``, and nothing done, where the kernels are made for other things.

        Args:
            ids_N: of all features, one feature after the other.
            offsets: [F * B + 1], of the bags.
            sample_weights_N: of the ids, if any; no gradients flow to them.
        """
        lookup: FusedLookup | TritonLookup = self._triton if takes(ids_N.contiguous()) else self._native
        return lookup(ids_N, offsets, sample_weights_N)
