"""Native kernels for the CPU, compiled on first use where there is a C++ compiler."""

from cce_torchrec.native.library import library

__all__ = ["library"]
