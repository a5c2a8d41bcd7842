"""The process group of a run: torchrun's where it started us, else a group of this one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
def process_group() -> Iterator[World]:
    """A process group for the duration of a run; one that exists already is used and left as it is."""
    device = _device()
    mine = not dist.is_initialized()
    if mine:
        _init("nccl" if device.type == "cuda" else "gloo", device)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if mine:
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


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _init(backend: str, device: torch.device) -> None:
    device_id = device if device.type == "cuda" else None
    if "RANK" in os.environ:  # started by torchrun, which says where the others are
        dist.init_process_group(backend, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
