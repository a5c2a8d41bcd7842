"""Re-clustering on another thread while training goes on: read now, computed beside the steps that follow, committed later.

What is committed does not depend on how fast the thread was, only on the steps at which it was begun and committed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport
from cce_torchrec.recluster.gradients import Collection
from cce_torchrec.recluster.step import checked_collections
from cce_torchrec.recluster.work import Reclustering, collectives_of

_NICENESS = 10  # the thread takes what the training leaves of the cores


def recluster_in_background(
    module: nn.Module,
    *,
    seed: int,
    config: ReclusterConfig | None = None,
    process_group: Any = None,
    optimizer: Optimizer | None = None,
    id_weights: Mapping[str, Tensor] | None = None,
) -> "BackgroundReclustering":
    """Begin to re-cluster a model as :func:`recluster` does, on another thread, while it is trained on.

    Codebooks, recorded gradients and counts are those of now; :meth:`BackgroundReclustering.commit` puts the result in place,
    moved as far as training has moved the ids of each row in the meantime:

        M[j] <- M[j] + mean of x_commit(v) - x_now(v) over the ids v of row j     (then the same for what helpers get)

    With no step between, that is what :func:`recluster` does. Until then the tables keep their assignments, cannot grow and
    cannot be re-clustered otherwise; a checkpoint keeps what was recorded, so that it can be begun again.

    Collective. The thread has a process group of its own, of gloo, with the timeout of the collection's.

    Args:
        module: as for :func:`recluster`.
        seed: as for :func:`recluster`.
        config: as for :func:`recluster`; optimizer state that is carried is that of now.
        process_group: as for :func:`recluster`.
        optimizer: as for :func:`recluster`.
        id_weights: as for :func:`recluster`.

    Raises:
        RuntimeError: where one is under way.
        ValueError: as :func:`recluster`; what is found while clustering is raised by ``commit``.

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> model = CompressedEmbeddingBagCollection(tables=[table])
        >>> under_way = recluster_in_background(model, seed=0)  # now train on ...
        >>> under_way.commit().tables[0].version
        1
    """
    started = time.perf_counter()
    collections = checked_collections(module, id_weights or {})
    work = Reclustering(
        collections,
        seed=seed,
        config=config,
        process_group=process_group,
        optimizer=optimizer,
        id_weights=id_weights,
    )
    work.read()
    return BackgroundReclustering(work, started)


class BackgroundReclustering:
    """One that :func:`recluster_in_background` began. Made and ended on the training's thread, on all ranks at the same step.

    Args:
        work: what is to be computed.
        started: when its reading began, by ``time.perf_counter()``.
    """

    def __init__(self, work: Reclustering, started: float) -> None:
        self._work = work
        self._groups = [_own_group(part.process_group) for part in work.parts]
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._stream = _stream_after_this_one()
        self._thread = threading.Thread(target=self._run, name="recluster")
        for part in work.parts:
            part.collection.reclustering = self
            if part.collection.id_gradients is not None:
                part.collection.id_gradients.clear()  # those of the next one; this one's are read
        self._thread.start()
        self._stalled = time.perf_counter() - started

    def commit(self) -> ReclusterReport:
        """Put the result in place, once it is there; collective.

        Raises:
            ValueError: on every rank, where weights were not finite, or are not by now; then nothing has changed.
            RuntimeError: where another rank failed; then, too.
        """
        started = time.perf_counter()
        try:
            self._thread.join()
            if self._error is not None:
                raise self._error
            self._work.catch_up()
            tables = self._work.commit()
        finally:
            self._end()
        return ReclusterReport(tables=tables, stalled_seconds=self._stalled + time.perf_counter() - started)

    def cancel(self) -> None:
        """Drop it; collective. The tables stay as they are, and what was recorded for it is forgotten."""
        self._stop.set()
        self._thread.join()
        self._end()

    def gradients(self, collection: Collection) -> dict[str, Any]:
        """What was recorded of a collection's tables before it was begun, by table."""
        return next(part.gradients for part in self._work.parts if part.collection is collection)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has nothing under way."""
        return type(None), ()

    def _end(self) -> None:
        for part in self._work.parts:
            part.collection.reclustering = None
        if self._error is not None:  # ranks may have left the groups in the middle of something
            for group in {part.process_group for part in self._work.parts} - {None}:
                _OWN_GROUPS.pop(group, None)

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own, which threads that it starts take over
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
        try:
            collectives = [_Interruptible(collectives_of(group), self._stop) for group in self._groups]
            with self._stream():
                self._work.compute(collectives)
        except BaseException as error:
            self._error = error


def cancel_reclustering(module: nn.Module) -> None:
    """Drop what is under way in a model, if anything is; collective."""
    found = reclustering_of(module)
    if found is not None:
        found.cancel()


def reclustering_of(module: nn.Module) -> BackgroundReclustering | None:
    """What is under way in a model."""
    found = (collection.reclustering for collection in module.modules() if isinstance(collection, Collection))
    return next((under_way for under_way in found if under_way is not None), None)


class _Interruptible(Collectives):
    """Collectives that raise once they are told to stop, or the program has ended."""

    def __init__(self, collectives: Collectives, stop: threading.Event) -> None:
        self._collectives, self._stop = collectives, stop
        self.rank, self.world_size = collectives.rank, collectives.world_size

    def _sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._collectives._sum(tensor)

    def _gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        return self._collectives._gather(tensor)

    def _all_to_all(
        self, rows: Tensor, lengths: list[int], received: Tensor, counts: list[int]
    ) -> Callable[[], Tensor]:
        return self._collectives._all_to_all(rows, lengths, received, counts)

    def alone(self) -> Collectives:
        return _Interruptible(self._collectives.alone(), self._stop)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self._check()
        return super().all_reduce_sum(tensor)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        self._check()
        return super().all_gather_rows(tensor)

    def exchange_rows(self, for_ranks: Sequence[Tensor]) -> Tensor:
        self._check()
        return super().exchange_rows(for_ranks)

    def _check(self) -> None:  # not where ranks are told of a failure, of which this is one
        if self._stop.is_set() or not threading.main_thread().is_alive():
            raise RuntimeError("the re-clustering in the background was cancelled")


def _stream_after_this_one() -> Callable[[], AbstractContextManager[None]]:
    """A CUDA stream for another thread, which begins when what is in this thread's is done; nothing without CUDA."""
    if not torch.cuda.is_initialized():
        return nullcontext
    device, read = torch.cuda.current_device(), torch.cuda.current_stream().record_event()

    @contextmanager
    def on_stream() -> Iterator[None]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_event(read)
            yield
            stream.synchronize()

    return on_stream


# Of the same ranks as the process groups of collections, by them: re-clusterings go over groups of their own, so that their
# collectives cannot get between those of training.
_OWN_GROUPS: MutableMapping[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Made once, for all re-clusterings; collective."""
    if group is None:
        return None
    if group not in _OWN_GROUPS:
        device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
        _OWN_GROUPS[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=group._get_backend(device).options._timeout,
            backend="gloo",
            use_local_synchronization=True,
        )
    return _OWN_GROUPS[group]
