"""How fast the machine at hand does what a re-clustering consists of: measured, then a few numbers that predict the rest.

Each rate is a sum of counts with a coefficient of seconds each, at least 0, fitted to small measurements:

    nearest of K centroids, N points of d dims     N (a + K (b + c d))          b, c: of a distance and of its dims
    one iteration of K-means                       N (a + sqrt(K) (b + c d) + K (e + f d)): bounds save most distances
    seeding                                        N (a rounds + S (b + c d)) + e P       S, P: distances, candidates
    a walk over ids, but for the nearest           V (a + columns (b + c d))
    a collective                                   calls * latency + bytes sent / bandwidth
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import CompressedEmbeddingBagConfig
from cce_torchrec.methods import CCE
from cce_torchrec.recluster import ReclusterConfig, recluster
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.simulate.work import Fit, Message, ReclusterWork

_SHAPES = ((64, 4), (64, 16), (256, 8), (1024, 4), (1024, 16), (2048, 8), (4096, 4), (4096, 8))  # K, d
_MOST_POINTS = 1 << 17
_ITERATIONS = 12
_SLOPE_IDS = (50_000, 250_000)
_MESSAGE_BYTES = (8, 1 << 16, 1 << 22)
Rate: TypeAlias = tuple[float, ...]
Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What collectives take.

    Attributes:
        latency: seconds a call.
        bytes_per_second: that a rank sends.
    """

    latency: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank of a machine does in how many seconds.

    Attributes:
        name: of the hardware.
        nearest: a search for the nearest centroids: [a, b, c].
        iteration: one of K-means: [a, b, c, e, f].
        seeding: of K-means: [a, b, c, e].
        walk: over ids: [a, b, c].
        network: between ranks; ``None`` where it was measured on one rank.
    """

    name: str
    nearest: Rate
    iteration: Rate
    seeding: Rate
    walk: Rate
    network: Network | None

    def seconds(self, work: ReclusterWork) -> dict[str, float]:
        """How long each part of a re-clustering is expected to take; communication is 0 without a network."""
        fit, table = work.fit, work
        of_a_fit = _dot(self.nearest, _search(fit.points, fit.num_centroids, fit.dim))
        of_a_fit += fit.iterations * _dot(self.iteration, _iteration(fit))
        of_a_fit += _dot(self.seeding, _seeding(fit, table.num_races / table.num_fits))
        points = table.assign_distances // fit.num_centroids
        assign = _dot(self.nearest, _search(points, fit.num_centroids, fit.dim))
        walk = _dot(self.walk, _walk(table.ids, table.num_columns * table.num_levels, fit.dim))
        talk = 0.0 if self.network is None else communication(self.network, table.messages, table.world_size)
        return {"fit": work.num_fits * of_a_fit, "assign": assign + walk, "communication": talk}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: where it is something else.
        """
        try:
            saved = json.loads(Path(path).read_text())
            rates = {f.name: tuple(saved[f.name]) for f in fields(cls) if f.name not in ("name", "network")}
            network = None if saved["network"] is None else Network(**saved["network"])
            return cls(name=saved["name"], network=network, **rates)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} has no rates of a machine ({error!r}): write it by `python -m cce_torchrec.simulate.measure`."
            ) from None


def communication(network: Network, messages: Sequence[Message], world_size: int) -> float:
    """Seconds of all collectives of one rank."""
    sent = sum(message.sent(world_size) for message in messages)
    return sum(message.calls for message in messages) * network.latency + sent / network.bytes_per_second


def _dot(rate: Rate, counts: Rate) -> float:
    return sum(seconds * count for seconds, count in zip(rate, counts, strict=True))


def _search(points: float, num_centroids: int, dim: int) -> Rate:
    return points, points * num_centroids, points * num_centroids * dim


def _iteration(fit: Fit) -> Rate:
    points, root = fit.points, math.sqrt(fit.num_centroids)
    return points, *(points * factor * each for factor in (root, root * root) for each in (1, fit.dim))


def _seeding(fit: Fit, races: float = 1) -> Rate:
    distances = fit.seeding_distances
    return fit.points * len(fit.rounds), distances, distances * fit.dim, races * fit.candidate_distances


def _walk(ids: float, columns: int, dim: int) -> Rate:
    return ids, ids * columns, ids * columns * dim


def measure(name: str, device: torch.device, clock: Clock = time.perf_counter) -> Machine:
    """Measure this machine, in less than a minute; on all ranks at once where a process group is initialised.

    The ranks are then all busy, as they are in a re-clustering, and what is measured is the mean over them.

    Args:
        name: what to call it.
        device: of this rank.
        clock: seconds; of the CPU time of this process, on a machine that others use too. The network's are wall-clock time.
    """
    stopwatch = _Stopwatch(device, clock)
    nearest, seeding, iteration = _measure_fits(stopwatch)
    walk = _measure_walk(stopwatch, nearest)
    return Machine(
        name=name,
        nearest=nearest,
        iteration=iteration,
        seeding=seeding,
        walk=walk,
        network=_measure_network(_Stopwatch(device, time.perf_counter)),
    )


class _Stopwatch:
    """Takes the time of work on a device; all ranks start together, and the result is their mean."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self._clock = device, clock

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """The least of some turns."""
        taken = []
        for _ in range(repeats):
            if dist.is_initialized():
                dist.barrier()
            self._finish()
            started = self._clock()
            work()
            self._finish()
            taken.append(self._clock() - started)
        return self._mean(min(taken))

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mean(self, value: float) -> float:
        if not dist.is_initialized():
            return value
        total = torch.tensor(value, dtype=torch.float64).to(self.device)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


def _measure_fits(stopwatch: _Stopwatch) -> tuple[Rate, Rate, Rate]:
    """Searches, seedings and iterations of K-means on points of a normal distribution."""
    searches, seedings, iterations = [], [], []
    search_counts, fits = [], []
    for num_centroids, dim in _SHAPES:
        num_points = min(_MOST_POINTS, ReclusterConfig().points_per_centroid * num_centroids)
        points_ND = torch.randn(num_points, dim, generator=torch.Generator().manual_seed(0)).to(stopwatch.device)
        ids_N = torch.arange(num_points, device=stopwatch.device)
        search = stopwatch.seconds(partial(assign_nearest, points_ND, points_ND[:num_centroids]), 3)
        fit = partial(kmeans, points_ND, num_centroids, seed=0, point_ids_N=ids_N, tolerance=0.0)
        seeded, fitted = (stopwatch.seconds(partial(fit, num_iterations=n), 2) for n in (0, _ITERATIONS))
        searches.append(search)
        seedings.append(max(seeded - search, 0.1 * seeded))
        iterations.append(max(fitted - seeded, 0.1 * fitted) / _ITERATIONS)
        search_counts.append(_search(num_points, num_centroids, dim))
        fits.append(Fit.of(num_points, num_centroids, dim, _ITERATIONS))
    return (
        fitted_rate(search_counts, searches),
        fitted_rate([_seeding(fit) for fit in fits], seedings),
        fitted_rate([_iteration(fit) for fit in fits], iterations),
    )


def _measure_walk(stopwatch: _Stopwatch, nearest: Rate) -> Rate:
    """What an id more costs, beside its search: from tables of two sizes whose few centroids are fitted alike."""
    counts, seconds = [], []
    for columns, dim in ((1, 4), (1, 16), (4, 4), (4, 16)):
        few, many = (stopwatch.seconds(_recluster_once(n, columns, dim, stopwatch.device), 3) for n in _SLOPE_IDS)
        ids = _SLOPE_IDS[1] - _SLOPE_IDS[0]
        search = _dot(nearest, _search(ids * columns, 16, dim))
        counts.append(_walk(ids, columns, dim))
        seconds.append(max(many - few - search, 0.1 * (many - few), 1e-9))
    return fitted_rate(counts, seconds)


def _recluster_once(num_ids: int, columns: int, dim: int, device: torch.device) -> Callable[[], Any]:
    table = CompressedEmbeddingBagConfig(
        name="t",
        num_embeddings=num_ids,
        embedding_dim=columns * dim,
        feature_names=["f"],
        method=CCE(num_rows=16, num_columns=columns),
    )
    collection = CompressedEmbeddingBagCollection(tables=[table], device=device)
    return lambda: recluster(collection, seed=0, config=ReclusterConfig(num_iterations=1))


def _measure_network(stopwatch: _Stopwatch) -> Network | None:
    """Latency and bandwidth of sums, over messages of several sizes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    ranks, calls = dist.get_world_size(), 8
    counts, seconds = [], []
    for size in _MESSAGE_BYTES:
        message = torch.zeros(size // 8, dtype=torch.float64, device=stopwatch.device)
        each = stopwatch.seconds(partial(_all_reduce, message, calls), 5) / calls
        counts.append((1.0, Message("all_reduce", 1, size).sent(ranks)))
        seconds.append(each)
    latency, per_byte = fitted_rate(counts, seconds)
    return Network(latency=latency, bytes_per_second=1 / max(per_byte, 1e-15))


def _all_reduce(message: torch.Tensor, calls: int) -> None:
    for _ in range(calls):
        dist.all_reduce(message)


def fitted_rate(counts: Sequence[Rate], seconds: Sequence[float]) -> Rate:
    """The coefficients, at least 0, of the least sum of squared *relative* errors.

    Args:
        counts: of each measurement.
        seconds: that it took.

    Example:
        >>> tuple(round(x, 6) for x in fitted_rate([(1.0, 10.0), (2.0, 10.0), (1.0, 30.0)], [3.0, 4.0, 7.0]))
        (1.0, 0.2)
    """
    scaled = np.array(counts) / np.array(seconds)[:, None]
    num = scaled.shape[1]
    best, least = np.zeros(num), np.inf
    for size in range(1, num + 1):
        for chosen in combinations(range(num), size):
            columns = scaled[:, chosen]
            found, *_ = np.linalg.lstsq(columns / columns.max(axis=0), np.ones(len(scaled)), rcond=None)
            found = found / columns.max(axis=0)
            error = float(np.square(columns @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(num), error
                best[list(chosen)] = found
    return tuple(float(x) for x in best)
