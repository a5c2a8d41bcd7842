"""What travels says what it was computed from: lookups go by position, so names are free to carry a version."""

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def stamp(version: int) -> str:
    """What names begin with."""
    return f"{version}|"


def is_stale(received: KeyedJaggedTensor, version: int) -> bool:
    """Whether what was received was computed from assignments, or blocks of ids, of another version."""
    return any(not key.startswith(stamp(version)) for key in received.keys()[:1])
