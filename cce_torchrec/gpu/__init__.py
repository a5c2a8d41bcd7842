"""Triton kernels for what the C++ of ``cce_torchrec.native`` does on a CPU: docs/gpu.md. Opt-in, and not yet run on a GPU."""

from cce_torchrec.gpu.dispatch import Lookup, can_look_up, takes

__all__ = ["Lookup", "can_look_up", "takes"]
