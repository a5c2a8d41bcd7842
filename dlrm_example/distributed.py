"""The process group of a run: torchrun's where it started us, else a group of this one process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlrm_example.roll_call import RollCall

T = TypeVar("T")
TIMEOUT = 600.0  # seconds
UNNAMED_JOB = "none"  # torchrun's, where nobody gives it a --rdzv_id
PATIENCE = 10.0  # seconds to wait for a sign of the other ranks, once a collective has failed


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout: float = TIMEOUT) -> Iterator[World]:
    """A process group for the duration of a run; one that exists already is used and left as it is.

    It is destroyed whatever happens, so that the other ranks' collectives fail rather than wait for this one.

    Args:
        timeout: seconds after which a collective that some rank does not join gives up.

    Raises:
        RanksLostError: a collective failed; the message names the ranks that are missing.
    """
    device = _device()
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), device)
        return
    roll_call = _init("nccl" if device.type == "cuda" else "gloo", device, timedelta(seconds=timeout))
    try:
        with roll_call.after_failures():
            yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


@contextmanager
def main_rank_first(world: World) -> Iterator[None]:
    """Rank 0 runs the body before the others do: it fetches what they then find in the cache."""
    if not world.is_main:
        dist.barrier()
    try:
        yield
    finally:
        if world.is_main:
            dist.barrier()


def on_main_rank(world: World, action: Callable[[], T]) -> T:
    """What the action returns on rank 0, on every rank. What it raises there, every rank raises."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def on_every_rank(world: World, action: Callable[[], None]) -> None:
    """Run a local action on every rank. What it raises on any of them, every rank raises; of several, the first rank's."""
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    failures = [failure]
    if world.size > 1:
        failures = [None] * world.size
        dist.all_gather_object(failures, failure)
    for each in failures:
        if each is not None:
            raise each


def restarts() -> int:
    """How often TorchElastic has started this node's processes again after a failure of theirs."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def elastic_job() -> str | None:
    """TorchElastic's name of the job, which outlives restarts, changes of its nodes and a scheduler's retries."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", UNNAMED_JOB)
    return None if name == UNNAMED_JOB else name


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _init(backend: str, device: torch.device, timeout: timedelta) -> RollCall:
    store: dist.Store = dist.HashStore()
    rank, size = 0, 1
    if "RANK" in os.environ:  # started by torchrun, which says where the others are
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The agent keeps its store when it starts us again, and in it the addresses of the processes before us.
            store = dist.PrefixStore(f"start_{restarts()}", store)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("process_group", store),
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
        timeout=timeout,
    )
    return RollCall(dist.PrefixStore("roll_call", store), rank, size, patience=min(PATIENCE, timeout.total_seconds()))
