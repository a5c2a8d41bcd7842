"""K-means and its collectives over a real process group: the same result on 1, 2 and 4 ranks, and no hang on a failure."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cce_torchrec.recluster import collectives as transports
from cce_torchrec.recluster import kmeans as fitting
from cce_torchrec.recluster import seeding
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives, ProcessGroupCollectives
from cce_torchrec.recluster.kmeans import KMeansResult, kmeans
from tests.distributed.harness import RankPool


@pytest.fixture(params=[2, 4])
def pool(request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{request.param}")


def some_points() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(40, (3001,), generator=generator)
    return torch.randn(40, 8, generator=generator)[which] + 0.4 * torch.randn(3001, 8, generator=generator)


def fit(ranks: Collectives, start: int, stop: int, K: int = 50, **options: Any) -> KMeansResult:
    ids = torch.arange(start, stop)
    return kmeans(some_points()[ids], K, seed=11, point_ids_N=ids, collectives=ranks, **options)


def even_share(rank: int, world_size: int) -> KMeansResult:
    return fit(ProcessGroupCollectives(), 3001 * rank // world_size, 3001 * (rank + 1) // world_size)


def everything_on_the_last_rank(rank: int, world_size: int) -> KMeansResult:
    return fit(ProcessGroupCollectives(), 0, 3001 if rank == world_size - 1 else 0)


def refilled_share(rank: int, world_size: int) -> KMeansResult:
    start, stop = 3001 * rank // world_size, 3001 * (rank + 1) // world_size
    return fit(ProcessGroupCollectives(), start, stop, initial_centroids_KD=far_away())


def far_away() -> Tensor:
    return 30 + torch.randn(50, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [even_share, everything_on_the_last_rank, refilled_share])
def test_any_number_of_ranks_finds_what_one_finds(pool: RankPool, share: Any) -> None:
    options = {"initial_centroids_KD": far_away()} if share is refilled_share else {}
    alone = fit(LocalCollectives(), 0, 3001, **options)
    for result in pool.run(share):
        torch.testing.assert_close(result.centroids_KD, alone.centroids_KD, rtol=1e-6, atol=1e-6)
        assert result.objective == pytest.approx(alone.objective, rel=1e-9)
        assert (result.iterations, result.num_refilled) == (alone.iterations, alone.num_refilled)


LARGEST = [0, 2**22]  # messages that are exchanged directly: none, as on NCCL, and small ones


def fails_on_rank_1(rank: int, world_size: int, where: str, largest: int) -> str:
    module = seeding if hasattr(seeding, where) else fitting
    failure = mock.patch.object(module, where, side_effect=MemoryError("out of luck"))
    with mock.patch.object(transports, "_EXCHANGED_BYTES", largest):
        with failure if rank == 1 else nullcontext(), pytest.raises(RuntimeError) as caught:
            even_share(rank, world_size)
        assert even_share(rank, world_size).objective > 0
    return str(caught.value)


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("where", ["_check_arguments", "_local_candidates", "_local_statistics"])
def test_a_rank_that_fails_stops_all_of_them_and_they_can_go_on(pool: RankPool, where: str, largest: int) -> None:
    expected = f"failed on 1 of {pool.world_size} ranks: rank 1: MemoryError: out of luck"
    assert pool.run(fails_on_rank_1, where, largest) == [expected] * pool.world_size


def bad_point_on_the_last_rank(rank: int, world_size: int) -> str:
    points = torch.ones(3, 2)
    points[1, 1] = torch.inf if rank == world_size - 1 else 1
    with pytest.raises(ValueError, match="not finite") as caught:
        kmeans(points, 2, seed=0, point_ids_N=torch.arange(3), collectives=ProcessGroupCollectives())
    return str(caught.value)


def test_a_bad_point_is_a_value_error_on_all_ranks(pool: RankPool) -> None:
    messages = pool.run(bad_point_on_the_last_rank)
    assert set(messages) == {messages[0]}
    assert messages[0].startswith(f"1 of {3 * pool.world_size} points")


def gathers(rank: int, world_size: int, largest: int) -> list[Tensor]:
    with mock.patch.object(transports, "_EXCHANGED_BYTES", largest):
        ranks = ProcessGroupCollectives()
    assert (ranks.rank, ranks.world_size) == (rank, world_size)
    uneven = torch.full((rank * 2, 3), rank, dtype=torch.int64)
    transposed = (torch.arange(6, dtype=torch.float64).reshape(2, 3) + 10 * rank).T
    summand = torch.tensor([rank, 1.5])
    results = [
        ranks.all_gather_rows(uneven),
        ranks.all_gather_rows(transposed),
        ranks.all_gather_rows(torch.empty(0, 4)),
        ranks.all_gather_rows(torch.tensor([rank % 2 == 0])),
        ranks.all_reduce_sum(summand),
        ranks.all_reduce_sum(torch.arange(15.0, dtype=torch.float64).view(3, 5).T * (rank + 1)),
        ranks.all_reduce_sum(torch.tensor(rank)),
        ranks.exchange_rows([torch.full((rank * to, 2), 10 * rank + to) for to in range(world_size)]),
        ranks.exchange_rows([torch.empty(0, 3)] * world_size),
    ]
    assert summand.tolist() == [rank, 1.5], "the input is not overwritten"
    return results


@pytest.mark.parametrize("largest", [*LARGEST, 64])
def test_gathers_and_sums(pool: RankPool, largest: int) -> None:
    size = pool.world_size
    transposed = torch.arange(6, dtype=torch.float64).reshape(2, 3).T
    all_ranks = sum(range(size))
    expected = [
        torch.cat([torch.full((rank * 2, 3), rank) for rank in range(size)]),
        torch.cat([transposed + 10 * rank for rank in range(size)]),
        torch.empty(0, 4),
        torch.tensor([rank % 2 == 0 for rank in range(size)]),
        torch.tensor([all_ranks, 1.5 * size]),
        torch.arange(15.0, dtype=torch.float64).view(3, 5).T * (all_ranks + size),
        torch.tensor(all_ranks),
    ]
    for rank, results in enumerate(pool.run(gathers, largest)):
        given = torch.cat([torch.full((source * rank, 2), 10 * source + rank) for source in range(size)])
        for result, target in zip(results, [*expected, given, torch.empty(0, 3)], strict=True):
            torch.testing.assert_close(result, target, rtol=0, atol=0)


def disagrees(rank: int, world_size: int) -> tuple[str, str]:
    ranks = ProcessGroupCollectives()
    ranks.agree()
    with pytest.raises(RuntimeError) as caught:
        ranks.agree(KeyError(f"né {rank}") if rank else None)
    return str(caught.value), type(caught.value.__cause__).__name__


def test_agree_names_every_rank_that_failed(pool: RankPool) -> None:
    failed = range(1, pool.world_size)
    message = f"failed on {len(failed)} of {pool.world_size} ranks: "
    message += "; ".join(f"rank {rank}: KeyError: 'né {rank}'" for rank in failed)
    assert pool.run(disagrees) == [(message, "NoneType"), *[(message, "KeyError") for _ in failed]]
