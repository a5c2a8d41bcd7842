"""Checkpoints by ``torch.distributed.checkpoint``, looked at before they are loaded.

    {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

is what is saved; it loads on any number of ranks, under any sharding type and assignment placement. Plain
``torch.distributed.checkpoint`` calls do the same work; :func:`load_checkpoint` adds that whatever does not fit is named
before anything is changed. Beside it, what is recorded for the next re-clustering is saved: how often ids were seen, and
gradients.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.optim import Optimizer

from cce_torchrec.lowering import LAYOUT_HOLDERS, LAYOUT_REMEDY, is_layout
from cce_torchrec.recluster.background import cancel_reclustering
from cce_torchrec.recluster.recorded import load_recorded, save_recorded


def checkpoint_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """What a checkpoint holds: codebooks, assignments, hash functions, versions, the rest of the model, optimizer state.

    Args:
        model: sharded or not.
        optimizer: a TorchRec ``KeyedOptimizer``, such as a ``CombinedOptimizer`` of the fused and the dense one.
    """
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def save_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Save a checkpoint; collective. It becomes readable when all ranks have written all of it.

    Args:
        path: a directory, on storage that all ranks share.
        model: sharded or not.
        optimizer: as for :func:`checkpoint_state`.

    Example:
        >>> import tempfile
        >>> from torch.optim import SGD
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, model)
        ...     load_checkpoint(folder, model)
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    save_recorded(Path(path), model, *_rank_and_world_size())
    dcp.save(
        _without_empty(checkpoint_state(model, optimizer)), checkpoint_id=str(path), no_dist=not dist.is_initialized()
    )


def save_checkpoint_async(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Future[Any]:
    """Save in the background a copy made now; training may go on. Wait for the result before the next save; collective.

    Args:
        path: as for :func:`save_checkpoint`.
        model: as for :func:`save_checkpoint`.
        optimizer: as for :func:`checkpoint_state`.
        process_group: a group of all ranks that nothing else uses, ``dist.new_group(backend="gloo")``; the collectives of
            the save would get between those of training otherwise.

    Raises:
        ValueError: where there are several ranks and no such group.
    """
    if process_group is None and dist.get_world_size() > 1:
        raise ValueError(
            "process_group=None would send the collectives of the save between those of training: make a group once, by "
            'dist.new_group(backend="gloo"), and pass it.'
        )
    state = _without_empty(checkpoint_state(model, optimizer))
    Path(path).mkdir(parents=True, exist_ok=True)
    save_recorded(Path(path), model, *_rank_and_world_size())
    # The default stager of torch does not know the sharded tensors of TorchRec's state dicts.
    saved = dcp.async_save(
        state, checkpoint_id=str(path), process_group=process_group, async_stager=BlockingAsyncStager()
    )
    assert isinstance(saved, Future)
    return saved


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Load a checkpoint in place, resharding as needed; collective.

    Args:
        path: a directory written by :func:`save_checkpoint` or a plain ``torch.distributed.checkpoint.save`` of
            :func:`checkpoint_state`.
        model: sharded or not, under any plan.
        optimizer: as for :func:`checkpoint_state`; ``None`` leaves the saved state aside.

    Raises:
        FileNotFoundError: where there is no complete checkpoint.
        ValueError: on every rank, with nothing changed, where a table has another method or size, a tensor is missing, or
            optimizer state cannot be resharded.
    """
    whole = checkpoint_state(model, optimizer)
    state = _without_empty(whole)
    if not (Path(path) / ".metadata").exists():
        raise FileNotFoundError(f"{path} holds no complete checkpoint (.metadata, which is written last, is missing).")
    saved = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    _agree(_misfit(state, saved))
    cancel_reclustering(model)
    dcp.load(state, checkpoint_id=str(path), no_dist=not dist.is_initialized())
    _put_back(whole, state)
    model.load_state_dict(whole["model"])
    if optimizer is not None:
        optimizer.load_state_dict(whole["optimizer"])
    load_recorded(Path(path), model, *_rank_and_world_size())


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _without_empty(state: dict[str, Any]) -> dict[str, Any]:
    """Without the empty dicts of what this rank has no share in, which would be looked for in the checkpoint."""
    parts = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in state.items()}
    return {key: value for key, value in parts.items() if not (isinstance(value, dict) and not value)}


def _put_back(whole: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Put what was loaded where it stands in the whole."""
    for key, value in loaded.items():
        if isinstance(value, dict):
            _put_back(whole[key], value)
        else:
            whole[key] = value


def _misfit(state: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """What does not fit on this rank, in words, or ``None``."""
    wanted = dict(_flat(state))
    for key in wanted:
        if is_layout(key) and key not in saved:
            table, _, own = key.rpartition(".")
            model, _, name = table.rpartition(".")
            holders = tuple(f"{model.rpartition('.')[0]}.{holder}.{name}." for holder in LAYOUT_HOLDERS)
            found = [path.rpartition(".")[2] for path in saved if path.startswith(holders) and is_layout(path)]
            was = f"was saved from {found[0]}" if found else "has no such table"
            return f"{table!r} {was}, but the model has {own}. {LAYOUT_REMEDY}"
    for key, value in wanted.items():
        if not isinstance(value, Tensor | ShardedTensor):
            continue
        if key not in saved:
            return f"there is no {key!r} in it: it was saved from another model, or with another optimizer."
        found_size = getattr(saved[key], "size", None)
        size = value.metadata().size if isinstance(value, ShardedTensor) else value.size()
        if found_size != size:
            return f"{key!r} has size {found_size} in the checkpoint and {size} here." + _advice(key)
    return None


def _advice(key: str) -> str:
    if not key.startswith("optimizer."):
        return ""
    return (
        " Row-wise optimizer state is kept once a column shard, so it loads only under as many column shards as it was "
        "saved from: plan the table that way, or load without the optimizer (optimizer=None)."
    )


def _flat(state: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts under the dotted names that ``torch.distributed.checkpoint`` gives them."""
    if not isinstance(state, dict):
        return [(prefix, state)]
    return [leaf for key, value in state.items() for leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _agree(misfit: str | None) -> None:
    """Raise on all ranks what any rank found."""
    found = [misfit]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, misfit)
    for rank, message in enumerate(found):
        if message is not None:
            raise ValueError(f"Cannot load the checkpoint (rank {rank}): {message}")
