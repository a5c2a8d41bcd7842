"""What the ranks find out together about the ids of a table, against loops over ids."""

from collections import Counter

import pytest
import torch

from cce_torchrec import CCE, ReclusterConfig
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster import workspace
from cce_torchrec.recluster.vocabulary import moved_fraction
from cce_torchrec.recluster.workspace import columns_of_a_rank, columns_together, recluster_workspace
from tests.unit.thread_ranks import on_threads


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_moved_fraction_is_that_of_a_loop(world_size: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    before_CN = torch.randint(7, (3, 500), generator=drawn)
    after_CN = torch.where(torch.rand(3, 500, generator=drawn) < 0.6, 6 - before_CN, torch.randint(7, (3, 500)))
    stayed = 0
    for before, after in zip(before_CN.tolist(), after_CN.tolist(), strict=True):
        for cluster in range(7):
            went = Counter(new for old, new in zip(before, after, strict=True) if old == cluster)
            stayed += max(went.values(), default=0)
    shares = torch.arange(500).tensor_split(world_size)
    for found in on_threads(
        world_size,
        lambda ranks: moved_fraction(before_CN.T[shares[ranks.rank]], after_CN.T[shares[ranks.rank]], 7, ranks),
    ):
        assert found == pytest.approx(1 - stayed / 1500)


def some_table(num_rows: int) -> CCERowMap:
    made = CCE(num_rows=num_rows, num_columns=8).row_map("t", 10**7, 128, torch.device("meta"))
    assert isinstance(made, CCERowMap)
    return made


def test_ranks_fit_columns_of_their_own_where_these_divide_evenly_and_memory_allows() -> None:
    config = ReclusterConfig()
    owned = {ranks: columns_of_a_rank(some_table(512), config, ranks) for ranks in (1, 2, 3, 4, 8, 16)}
    assert owned == {1: 0, 2: 4, 3: 0, 4: 2, 8: 1, 16: 0}
    assert columns_of_a_rank(some_table(65_536), config, 8) == 0


def test_columns_are_fitted_together_where_that_saves_messages_and_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ReclusterConfig()
    assert columns_together(some_table(512), config, 1) == 1
    assert columns_together(some_table(512), config, 8) == 8
    assert columns_together(some_table(65_536), config, 8) == 1
    assert columns_together(some_table(1024), config, 2) == 3  # 3 + 3 + 2, rather than 4 + 4 or 8
    monkeypatch.setattr(workspace, "_FITTED_BYTES", 0)
    alone = recluster_workspace(some_table(1024), config, 2, "cpu", is_sharded=True).transient
    monkeypatch.undo()
    assert alone < recluster_workspace(some_table(1024), config, 2, "cpu", is_sharded=True).transient < alone + 2**28
