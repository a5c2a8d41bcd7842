"""The harness itself: values come back, failures name their rank, nothing hangs and nothing is left running."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, RankPool, run_ranks

pytestmark = pytest.mark.distributed


def describe(rank: int, world_size: int, offset: int) -> dict[str, Any]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env = [int(os.environ[name]) for name in names]
    return {"rank": rank, "total": total, "env": env, "threads": torch.get_num_threads(), "noise": torch.rand(1)}


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a cat on the keyboard")
    dist.barrier()  # never finishes: rank 1 is not coming


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(600)


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def unpicklable(rank: int, world_size: int) -> Any:
    return lambda: None


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_run_ranks_returns_each_ranks_value_and_sets_its_environment() -> None:
    results = run_ranks(4, describe, 10, local_world_size=2)
    assert [r["rank"] for r in results] == [0, 1, 2, 3]
    assert all(r["total"].item() == 10 * 4 + 6 for r in results)
    assert [r["env"] for r in results] == [[0, 4, 0, 2], [1, 4, 1, 2], [2, 4, 0, 2], [3, 4, 1, 2]]
    assert all(r["threads"] == 1 for r in results)


def test_pool_keeps_its_processes_and_seeds_every_run(ranks2: RankPool) -> None:
    pids = ranks2.run(pid)
    first, second = ranks2.run(describe, 0), ranks2.run(describe, 0)
    assert ranks2.run(pid) == pids
    assert len(set(pids)) == 2
    torch.testing.assert_close(first[0]["noise"], second[0]["noise"])


@pytest.mark.parametrize(
    ("fn", "rank", "message"),
    [
        (fail_on_one, 1, "(?s)rank 1 of 2 failed.*ValueError: a cat on the keyboard"),
        (die_on_one, 1, "rank 1 of 2 failed"),
        (unpicklable, None, "failed in"),
    ],
)
def test_failure_is_reported_with_its_rank_and_the_pool_recovers(fn: Any, rank: int | None, message: str) -> None:
    with RankPool(2) as pool:
        pids = pool.run(pid)
        started = time.monotonic()
        with pytest.raises(RankError, match=message) as caught:
            pool.run(fn)
        assert time.monotonic() - started < 30
        assert rank is None or caught.value.rank == rank
        assert not any(is_running(p) for p in pids)
        assert pool.run(describe, 0)[1]["total"].item() == 1


def test_hung_rank_is_killed_after_the_timeout_and_its_stack_shown() -> None:
    with RankPool(2) as pool:
        pids = pool.run(pid)
        started = time.monotonic()
        with pytest.raises(RankError, match=r"(?s)ranks \[0\] of 2 did not finish .*hang_on_one.* in hang_on_one"):
            pool.run(hang_on_one, timeout=1.0)
        assert time.monotonic() - started < 30
        assert not any(is_running(p) for p in pids)


def test_close_ends_the_ranks() -> None:
    pool = RankPool(2)
    pids = pool.run(pid)
    pool.close()
    assert not any(is_running(p) for p in pids)


def test_local_world_size_must_divide_world_size() -> None:
    with pytest.raises(ValueError, match="local_world_size=3"):
        RankPool(4, local_world_size=3)
