"""Computations in step: each gets what it would get alone, in fewer messages, and none is left waiting for a failed rank."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cce_torchrec.recluster.collectives import Collectives, LocalCollectives
from cce_torchrec.recluster.kmeans import KMeansResult, kmeans, kmeans_steps
from cce_torchrec.recluster.together import Once, Rows, Steps, Sum, run_together
from tests.unit.thread_ranks import on_threads


def rows_of(rank: int, height: int, width: int) -> Tensor:
    """A share that has other rows on each rank; rank 1 has none."""
    return torch.arange(height * width).view(height, width) + 1000 * rank if rank != 1 else torch.empty(0, width).long()


def asks(rank: int, turns: int, height: int, width: int) -> Steps[list[Tensor]]:
    """A computation of some turns, each with one question of every kind, that returns the answers."""
    answers = []
    for turn in range(turns):
        answers.append((yield Sum(torch.full((height, 2), float(rank + turn), dtype=torch.float64))))
        answers.append((yield Rows(rows_of(rank, height, width) + turn)))
        answers.append((yield Once(lambda turn=turn: torch.full((height, 1), turn))))
    return answers


def expected(world_size: int, turns: int, height: int, width: int) -> list[Tensor]:
    answers = []
    for turn in range(turns):
        answers.append(torch.full((height, 2), sum(rank + turn for rank in range(world_size))).double())
        answers.append(torch.cat([rows_of(rank, height, width) + turn for rank in range(world_size)]))
        answers.append(torch.full((height, 1), turn))
    return answers


SHAPES = [(1, 3, 2), (3, 0, 1), (2, 5, 4), (0, 1, 1), (3, 1, 1)]  # turns, height, width


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_computation_gets_its_own_answers(world_size: int) -> None:
    def work(ranks: Collectives) -> list[list[Tensor]]:
        return run_together([asks(ranks.rank, *shape) for shape in SHAPES], ranks)

    for results in on_threads(world_size, work):
        for answers, shape in zip(results, SHAPES, strict=True):
            for answer, right in zip(answers, expected(world_size, *shape), strict=True):
                torch.testing.assert_close(answer, right, rtol=0, atol=0)


def test_one_rank_does_what_is_done_once_and_they_take_turns() -> None:
    done: list[tuple[int, int]] = []

    def once(rank: int, number: int) -> Steps[int]:
        def work() -> Tensor:
            done.append((rank, number))
            return torch.tensor([[10 * number]])

        return int((yield Once(work)))

    results = on_threads(3, lambda ranks: run_together([once(ranks.rank, number) for number in range(5)], ranks))
    assert results == [[0, 10, 20, 30, 40]] * 3
    assert sorted(done, key=lambda pair: pair[1]) == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4)]


@pytest.mark.parametrize("place", ["before the sum", "before the rows", "once", "at the end"])
def test_where_one_rank_fails_all_do(place: str) -> None:
    def fails(rank: int) -> Steps[None]:
        def at(here: str) -> None:
            if rank == 1 and here == place:
                raise MemoryError("out of luck")

        def work() -> Tensor:
            at("once")
            return torch.zeros(1, 1, dtype=torch.int64)

        at("before the sum")
        yield Sum(torch.zeros(3, dtype=torch.float64))
        at("before the rows")
        yield Rows(torch.zeros(2, 2, dtype=torch.int64))
        yield Once(work)
        at("at the end")

    for error in on_threads(3, lambda ranks: run_together([asks(ranks.rank, 2, 1, 1), fails(ranks.rank)], ranks)):
        assert isinstance(error, RuntimeError)
        assert str(error) == "failed on 1 of 3 ranks: rank 1: MemoryError: out of luck"


def problem(number: int) -> tuple[Tensor, dict[str, Any]]:
    """K-means problems that end at different times: with refills, with few distinct points, and ordinary ones."""
    points = torch.randn(900, 3 + number % 2, generator=torch.Generator().manual_seed(number))
    if number == 1:
        return points, {"num_centroids": 20, "initial_centroids_KD": 30 + points[:20]}
    if number == 2:
        return points[:5].repeat(180, 1), {"num_centroids": 8}
    return points, {"num_centroids": 10 + number, "num_iterations": 5 * number}


FITS = {number: problem(number) for number in range(4)}


class Counted(LocalCollectives):
    """Notes the messages."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self.messages["sum"] += 1
        return super().all_reduce_sum(tensor)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        self.messages["rows"] += 1
        return super().all_gather_rows(tensor)


def assert_same(ours: KMeansResult, alone: KMeansResult) -> None:
    torch.testing.assert_close(ours.centroids_KD, alone.centroids_KD, rtol=0, atol=0)
    assert ours.objective == pytest.approx(alone.objective, rel=1e-12)
    assert (ours.iterations, ours.num_refilled) == (alone.iterations, alone.num_refilled)


@pytest.mark.parametrize("world_size", [1, 3])
def test_fits_together_are_those_alone(world_size: int) -> None:
    def share(number: int, rank: int) -> Steps[KMeansResult]:
        points, options = problem(number)
        mine = torch.arange(900 * rank // world_size, 900 * (rank + 1) // world_size)
        return kmeans_steps(points[mine], seed=number, point_ids_N=mine, **options)

    alone = [kmeans(points, seed=n, point_ids_N=torch.arange(900), **options) for n, (points, options) in FITS.items()]
    assert alone[1].num_refilled > 0
    for results in on_threads(world_size, lambda ranks: run_together([share(n, ranks.rank) for n in FITS], ranks)):
        for ours, right in zip(results, alone, strict=True):
            assert_same(ours, right)


def test_fits_together_send_as_many_messages_as_the_longest_alone() -> None:
    def fit() -> Steps[KMeansResult]:
        return kmeans_steps(points, 12, seed=0, point_ids_N=torch.arange(900), num_iterations=6, tolerance=0.0)

    points, _ = FITS[3]
    one, many = Counted(), Counted()
    run_together([fit()], one)
    run_together([fit() for _ in range(5)], many)
    assert many.messages == one.messages
    assert one.messages["sum"] == 7
