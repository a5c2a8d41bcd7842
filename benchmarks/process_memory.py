"""What this process really takes of the machine's memory, as Linux counts it."""

import ctypes
import gc
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes in memory now, when what was freed has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _bytes("VmRSS")


def reset_peak() -> None:
    """Let :func:`peak` forget what was before."""
    _CLEAR.write_text("5")


def peak() -> int:
    """The most bytes in memory since :func:`reset_peak`."""
    return _bytes("VmHWM")


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{_STATUS} has no {name}: this needs Linux."
    return 1024 * int(found[1])
