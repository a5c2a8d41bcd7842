"""Native kernels for the CPU, compiled on first use where there is a C++ compiler."""

from cce_torchrec.native.build import library, switched_off

__all__ = ["library", "switched_off"]
