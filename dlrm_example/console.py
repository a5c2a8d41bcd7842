"""What a command-line run shows: our log lines and progress on rank 0, without the stack's own chatter."""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOGS = "logs"
OUR_LOGGERS = ("dlrm_example", "cce_torchrec")
STACK_WARNINGS = (  # what torchrec, fbgemm and torchmetrics say about their own use of torch
    "HeuristicalStorageReservation is known to cause issues",
    "`broadcast_buffers` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "Using a non-tuple sequence for multidimensional indexing is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not registered",
)


def is_main_process() -> bool:
    """Whether this is rank 0, or not one of several ranks at all; known before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging() -> None:
    """Log to standard output. For entry points only: it replaces whatever logging was set up before."""
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_the_user)
        handler.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    for message in STACK_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def log_of_this_rank(run_dir: str, rank: int, world_size: int) -> Iterator[None]:
    """Where there are several ranks, each logs to a file of its own too: `run_dir/logs/rank_N.log`."""
    if world_size == 1:
        yield
        return
    folder = Path(run_dir) / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank_{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_is_for_the_user)
    only_here = logging.Logger("dlrm_example.rank", logging.INFO)  # not on the console
    for each in (only_here, logging.getLogger()):
        each.addHandler(handler)
    try:
        only_here.info("rank %d of %d is process %d on %s", rank, world_size, os.getpid(), socket.gethostname())
        yield
    except Exception:
        only_here.exception("rank %d ends with an error", rank)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return record.name.startswith(OUR_LOGGERS) or record.levelno >= logging.ERROR


def progress_bar(items: Iterable[T], title: str, total: int, shown: bool) -> Iterable[T]:
    """The items, with a bar that goes away when it is full; on a terminal only."""
    return tqdm(items, desc=title, total=total, disable=None if shown else True, leave=False)
