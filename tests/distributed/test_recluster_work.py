"""What the model says a re-clustering does, against what one did: every collective, every distance, the memory.

And that ranks which fit columns of their own, or share all fits, find what one rank does.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from cce_torchrec import CCE, ReclusterConfig, ResidualCCE
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster import seeding, workspace
from cce_torchrec.recluster.collectives import LocalCollectives, ProcessGroupCollectives
from cce_torchrec.recluster.nearest import Tracker
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import TableState
from cce_torchrec.simulate.work import ReclusterWork, recluster_work
from tests.distributed.harness import RankPool

CPU = torch.device("cpu")
METHODS = {
    "cce": CCE(num_rows=24, num_columns=4, num_helper_rows=40),  # 2 columns a rank, or one
    "wide": CCE(num_rows=300, num_columns=2),  # one column a rank of 2, in step on 4
    "levels": ResidualCCE(num_rows=32, num_levels=3, num_columns=2),
    "groups": CCE(num_rows=24, num_columns=8),  # in step, as it is not given the memory: 3, 3 and 2 columns together
}
CONFIG = ReclusterConfig(num_iterations=3, tolerance=0.0, decode_batch_size=2048)
LONG = {"long": CCE(num_rows=40, num_columns=8)}  # 64 dims a column; 4 columns a rank of 2
NUM_IDS = {"cce": 5001, "wide": 9000, "levels": 6000, "groups": 4000, "long": 9000}  # all are in the sample


def row_map(name: str, device: torch.device) -> CCERowMap:
    made = {**METHODS, **LONG}[name].row_map("t", NUM_IDS[name], 512 if name in LONG else 16, device)
    assert isinstance(made, CCERowMap)
    return made


def table_state(name: str, rank: int, world_size: int, *, is_sharded: bool) -> TableState:
    of_table = row_map(name, CPU)
    if is_sharded:
        share = -(-NUM_IDS[name] // world_size)
        of_table.keep_block(rank * share, min((rank + 1) * share, NUM_IDS[name]), CPU)
    drawn = torch.Generator().manual_seed(5)
    books = [torch.randn(column.num_rows, column.dim, generator=drawn) for column in of_table.columns]
    no_state = [book.new_zeros(len(book), 0) for book in books]
    return TableState(
        name="t", row_map=of_table, rows=of_table.rows, codebooks=books, optimizer_state=no_state, weights_V=None
    )


class Instrument(ExitStack):
    """Counts what is asked of collectives and of the functions that compute distances."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[tuple[str, int]] = Counter()
        self.distances: Counter[str] = Counter()
        self._inside = False

    def __enter__(self) -> "Instrument":
        nearest = Tracker.nearest

        def counted_nearest(tracker: Tracker, centroids_KD: Tensor) -> Any:
            kind = "assign" if tracker._once else "search"
            self.distances[kind] += len(tracker._points_ND) * len(centroids_KD)
            return nearest(tracker, centroids_KD)

        self.enter_context(mock.patch.object(Tracker, "nearest", counted_nearest))
        self._count(seeding, "_costs_by_scores", "seeding")
        to_candidates = seeding._to_candidates

        def counted_candidates(point_D: Any, points_MD: Any) -> Any:
            self.distances["candidates"] += len(points_MD)
            return to_candidates(point_D, points_MD)

        self.enter_context(mock.patch.object(seeding, "_to_candidates", counted_candidates))
        self._listen("_sum", "all_reduce")
        self._listen("_gather", "all_gather")
        self._listen("_all_to_all", "all_to_all")
        return self

    def _count(self, module: Any, name: str, kind: str) -> None:
        original: Callable[..., Tensor] = getattr(module, name)

        def counted(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
            self.distances[kind] += len(points_ND) * len(centroids_KD)
            return original(points_ND, centroids_KD)

        self.enter_context(mock.patch.object(module, name, counted))

    def _listen(self, name: str, collective: str) -> None:
        original = getattr(ProcessGroupCollectives, name)

        def heard(collectives: ProcessGroupCollectives, tensor: Tensor, *splits: Any) -> Any:
            if self._inside:  # one message that is made of others
                return original(collectives, tensor, *splits)
            self.messages[collective, tensor.numel() * tensor.element_size()] += 1
            self._inside = True
            begun = original(collectives, tensor, *splits)
            self._inside = False

            def wait() -> Any:
                self._inside = True
                result = begun()
                self._inside = False
                return result

            return wait

        self.enter_context(mock.patch.object(ProcessGroupCollectives, name, heard))


@contextmanager
def memory_of_groups(name: str, world_size: int) -> Iterator[None]:
    """Lets "groups" have the memory for 3 of its 8 columns, and the others all that there is."""
    share = workspace._sample_bytes(row_map(name, CPU), CONFIG, world_size)
    with mock.patch.object(workspace, "_FITTED_BYTES", 3 * share if name == "groups" else 2**28):
        yield


def on_a_rank(rank: int, world_size: int, name: str, is_sharded: bool) -> tuple[Counter[Any], Counter[str]]:
    """A re-clustering, and what was counted."""
    state = table_state(name, rank, world_size, is_sharded=is_sharded)
    collectives = LocalCollectives() if world_size == 1 else ProcessGroupCollectives()
    with Instrument() as instrument, memory_of_groups(name, world_size):
        recluster_table(state, seed=3, config=CONFIG, collectives=collectives)
    return instrument.messages, instrument.distances


def expected(name: str, world_size: int, is_sharded: bool) -> ReclusterWork:
    with memory_of_groups(name, world_size):
        return recluster_work(row_map(name, torch.device("meta")), CONFIG, world_size, "cpu", is_sharded)


def check(work: ReclusterWork, messages: Counter[Any], distances: Counter[str]) -> None:
    counted: Counter[Any] = Counter()
    for message in work.messages:
        counted[message.collective, message.bytes] += message.calls
    assert messages == counted
    assert distances["search"] == work.num_fits * work.fit.search_distances
    assert distances["seeding"] == work.num_fits * work.fit.seeding_distances
    assert distances["candidates"] == work.num_races * work.fit.candidate_distances
    assert distances["assign"] == work.assign_distances


@pytest.mark.parametrize("name", METHODS)
def test_on_one_rank(name: str) -> None:
    check(expected(name, 1, False), *on_a_rank(0, 1, name, False))


@pytest.mark.distributed
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_on_several_ranks(request: pytest.FixtureRequest, ranks: int, name: str, is_sharded: bool) -> None:
    """The model is of the first rank, whose share is the largest."""
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    check(expected(name, ranks, is_sharded), *pool.run(on_a_rank, name, is_sharded)[0])


def new_table(rank: int, world_size: int, name: str) -> list[Tensor]:
    state = table_state(name, rank, world_size, is_sharded=False)
    collectives = LocalCollectives() if world_size == 1 else ProcessGroupCollectives()
    with memory_of_groups(name, world_size):
        new = recluster_table(state, seed=3, config=CONFIG, collectives=collectives)
    return [new.assignments, *new.codebooks]


@pytest.mark.distributed
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_table_on_several_ranks(request: pytest.FixtureRequest, ranks: int, name: str) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    expected = new_table(0, 1, name)
    for found in pool.run(new_table, name):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def peak_memory(rank: int, world_size: int, name: str, is_sharded: bool) -> int:
    state = table_state(name, rank, world_size, is_sharded=is_sharded)
    tracker = MemTracker()
    tracker.track_external(state.row_map)
    collectives = LocalCollectives() if world_size == 1 else ProcessGroupCollectives()
    with tracker:
        before = tracker.get_tracker_snapshot("current")[CPU]["Total"]
        recluster_table(state, seed=3, config=CONFIG, collectives=collectives)
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["wide", "long"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_is_within_the_bound(request: pytest.FixtureRequest, ranks: int, name: str) -> None:
    found = [peak_memory(0, 1, name, False)]
    if ranks > 1:
        found = request.getfixturevalue(f"ranks{ranks}").run(peak_memory, name, True)
    bound = expected(name, ranks, ranks > 1).workspace
    scores = 4 << 20  # the block of distances, which is not used where the native kernel runs
    assert max(found) <= sum(bound) <= 2.5 * max(found) + scores
