"""Counts the bytes that collectives have to send, by wrapping the functions of ``torch.distributed``."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class CountBytes:
    """A context in which the bytes that collectives have to send from this rank are counted, by collective."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._original: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "CountBytes":
        for name in ("all_to_all_single", "all_reduce", "reduce_scatter", "reduce_scatter_tensor"):
            self._wrap(name)
        for name in ("all_gather", "all_gather_into_tensor"):
            self._wrap(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._original.items():
            setattr(dist, name, function)

    def _wrap(self, name: str) -> None:
        original = getattr(dist, name)
        self._original[name] = original

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += sent_bytes(name, args, kwargs)
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def sent_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What one call of a collective sends from this rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    argument = {"all_reduce": ("tensor", 0), "reduce_scatter": ("input_list", 1)}.get(name, ("input", 1))
    if name == "all_gather":
        argument = ("tensor", 1)
    elif name == "all_gather_into_tensor":
        argument = ("input_tensor", 1)
    value = kwargs.get(argument[0], args[argument[1]] if len(args) > argument[1] else None)
    assert value is not None, f"{name} called in a way that is not counted: {list(kwargs)}"
    size = sum(t.numel() * t.element_size() for t in (value if isinstance(value, list) else [value]))
    if name == "all_to_all_single":
        splits = kwargs.get("input_split_sizes", args[3] if len(args) > 3 else None)
        return size * (ranks - 1) // ranks if not splits else size - size * splits[rank] // max(sum(splits), 1)
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "all_gather_into_tensor": ranks - 1}
    return round(size * share.get(name, (ranks - 1) / ranks))
