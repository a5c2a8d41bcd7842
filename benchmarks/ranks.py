"""Process groups of the benchmarks: one rank in this process, or several in processes of their own, one thread each."""

import logging
import os
import pickle
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp


def quieten() -> None:
    """What torchrec and fbgemm say about themselves."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def free_port() -> int:
    """One that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def rank_of(rank: int, ranks: int, port: int) -> Iterator[None]:
    """This process as a rank of a gloo group, with one thread."""
    quieten()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(*args)`` returned on each rank of a new group; an error on one stops all of them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_life, args=(ranks, free_port(), folder, work, args), nprocs=ranks)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _life(rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with rank_of(rank, ranks, port):
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(work(*args)))
        dist.barrier()
