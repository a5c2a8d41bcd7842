"""Run a function on several ranks, each a process of its own with a gloo process group on loopback.

* ``run_ranks(2, fn, *args)`` starts two processes, returns ``[fn(0, 2, *args), fn(1, 2, *args)]`` and ends them.
* ``RankPool(2)`` keeps its processes and their process group between calls. Starting takes seconds, a call takes
  milliseconds, so tests take the session-wide fixtures ``ranks2`` and ``ranks4``.

``fn`` must be a top-level function, its arguments and results picklable. A rank that raises, dies or hangs becomes a
``RankError`` in the caller, and all ranks are killed; nothing waits for a collective that can no longer finish.
"""

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# The server imports the stack once and forks the ranks off, which saves each of them the seconds an import takes. It
# runs nothing but imports, so no thread pool exists yet when it forks. Ranks see the environment as it was at the first
# start: a variable that a test sets later must be passed as an argument.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torchrec", "torchrec.distributed.model_parallel"])

START_TIMEOUT = 120.0
"""Seconds that the ranks may take to start, imports included."""

GRACE = 0.3
"""Seconds given to the other ranks, after one failed, to report that they failed as well."""


class RankError(RuntimeError):
    """A rank raised, died or did not finish; ``rank`` is the first that is known to have done so."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class RankPool:
    """``world_size`` processes with one process group, which run functions one after another.

    Args:
        world_size: number of ranks.
        local_world_size: ranks a host, as TorchRec understands it (``LOCAL_WORLD_SIZE``); all of them if None.
            It must divide ``world_size``.
        collective_timeout: seconds before a collective gives up.
    """

    def __init__(
        self, world_size: int, *, local_world_size: int | None = None, collective_timeout: float = 60.0
    ) -> None:
        self.world_size = world_size
        self.local_world_size = world_size if local_world_size is None else local_world_size
        if world_size % self.local_world_size:
            raise ValueError(f"local_world_size={local_world_size} does not divide world_size={world_size}")
        self.collective_timeout = collective_timeout
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Return ``[fn(rank, world_size, *args) for each rank]``.

        Every rank's random number generators are seeded with 0 first, so that the order of tests does not matter.

        Raises:
            RankError: a rank raised, died, or took longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        try:
            task = pickle.dumps((fn, args))
            for connection in self._connections:
                connection.send_bytes(task)
            return self._collect(timeout, f"{fn.__module__}.{fn.__qualname__}")
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Let the ranks finish and end; kill those that do not."""
        for connection in self._connections:
            try:
                connection.send_bytes(pickle.dumps(None))
            except OSError:
                continue  # that rank is gone already
        for process in self._processes:
            process.join(5.0)
        self.kill()

    def kill(self) -> None:
        """End all ranks at once; the next ``run`` starts new ones."""
        for process in self._processes:
            process.kill()  # by process id, and nothing happens to one that has ended
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        if self._processes:
            self._stacks.cleanup()
            del self._store
        self._processes, self._connections = [], []

    def _start(self) -> None:
        # The store lives in this process and listens on a port that the system chose, so no port can be lost meanwhile.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stacks = tempfile.TemporaryDirectory(prefix="ranks-")
        try:
            for rank in range(self.world_size):
                self._start_rank(rank)
            self._collect(START_TIMEOUT, "starting")
        except BaseException:
            self.kill()
            raise

    def _start_rank(self, rank: int) -> None:
        ours, theirs = _CONTEXT.Pipe()
        sizes = (rank, self.world_size, self.local_world_size)
        joining = (self._store.port, self.collective_timeout, self._stack_file(rank))
        process = _CONTEXT.Process(target=_serve, args=(*sizes, *joining, theirs), daemon=True, name=f"rank{rank}")
        process.start()
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """Wait for one reply of every rank, or raise for the ranks that give none or a failure."""
        deadline = time.monotonic() + timeout
        replies: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(replies) + len(failures) < self.world_size:
            waiting = {c: r for r, c in enumerate(self._connections) if r not in replies and r not in failures}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                ok, reply = self._receive(rank)
                (replies if ok else failures)[rank] = reply
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            # A rank that died makes others fail in their collectives, maybe before its own end is noticed.
            dead = (rank for rank in failures if not self._processes[rank].is_alive())
            first = next(dead, next(iter(failures)))
            others = [rank for rank in failures if rank != first]
            also = f" (ranks {others} failed as well)" if others else ""
            raise RankError(first, f"rank {first} of {self.world_size} failed in {what}{also}:\n{failures[first]}")
        late = [rank for rank in range(self.world_size) if rank not in replies]
        if late:
            stacks = "\n".join(f"rank {rank} is at:\n{self._stack(rank)}" for rank in late)
            raise RankError(
                late[0], f"ranks {late} of {self.world_size} did not finish {what} in {timeout} s.\n{stacks}"
            )
        return [replies[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5.0)
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"

    def _stack_file(self, rank: int) -> str:
        return str(Path(self._stacks.name, f"rank{rank}"))

    def _stack(self, rank: int) -> str:
        """Ask a rank that hangs for its Python stack."""
        process, path = self._processes[rank], Path(self._stack_file(rank))
        if not path.exists() or process.pid is None:
            return "(no stack: the rank was still starting)"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return path.read_text() or "(no stack)"


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    local_world_size: int | None = None,
) -> list[Any]:
    """Return ``[fn(rank, world_size, *args) for each rank]``, run in processes that are new and end with the call.

    Raises:
        RankError: a rank raised, died, or took longer than ``timeout`` seconds (starting not counted).
    """
    with RankPool(world_size, local_world_size=local_world_size) as pool:
        return pool.run(fn, *args, timeout=timeout)


def _serve(
    rank: int,
    world_size: int,
    local_world_size: int,
    port: int,
    collective_timeout: float,
    stack_file: str,
    connection: Connection,
) -> None:
    """A rank's life: join the process group, then run what comes down the connection until None comes or it closes."""
    with Path(stack_file).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            _join(rank, world_size, local_world_size, port, timedelta(seconds=collective_timeout))
        except Exception:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return
        connection.send_bytes(pickle.dumps((True, None)))
        while (task := _next_task(connection)) is not None:
            connection.send_bytes(_run_task(task, rank, world_size))
        dist.destroy_process_group()


def _join(rank: int, world_size: int, local_world_size: int, port: int, timeout: timedelta) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank % local_world_size),
        LOCAL_WORLD_SIZE=str(local_world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    # What the project's own modules are warned about is an error here too, as pytest makes it in its own process.
    warnings.filterwarnings("error", module=r"(cce_torchrec|dlrm_example|launch)\b")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _next_task(connection: Connection) -> bytes | None:
    """The next pickled task; None at the end. It is unpickled later, where a failure to do so is reported."""
    try:
        task = connection.recv_bytes()
    except EOFError:
        return None
    return None if task == pickle.dumps(None) else task


def _run_task(task: bytes, rank: int, world_size: int) -> bytes:
    """The pickled (ok, result or traceback) of a task. Plain pickle: tensors travel by value, not as shared memory."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        fn, args = pickle.loads(task)
        return pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
