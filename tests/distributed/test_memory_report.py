"""The report of a sharded collection counts what all ranks store, replicas once."""

import pytest
import torch
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.distributed.harness import RankPool
from tests.distributed.models import ON_2, Model, batch, physical_tables, shard
from tests.distributed.reference import loss_of

pytestmark = pytest.mark.distributed


def check_report(rank: int, world_size: int, places: str, optimizer: type) -> None:
    model = Model()
    expected = model.collection.memory_report()
    numbers = {name: model.collection.codebook(name).shape for name in physical_tables(model.collection)}
    apply_optimizer_in_backward(optimizer, model.collection.parameters(), {"lr": 0.1})
    placements = ON_2[places](list(numbers))
    dmp = shard(model, placements)
    loss_of(dmp(batch(torch.Generator().manual_seed(0), 4))).backward()
    for unsharded, table, lowered in zip(
        expected.tables, dmp.module.collection.memory_report().tables, model.collection.lowered_tables, strict=True
    ):
        held = [name for name in lowered.physical_names if rank in placements[name].ranks or not placements[name].ranks]
        per_row = {name: placements[name].column_shards for name in held}
        state = sum(4 * numbers[n][0] * (per_row[n] if optimizer is RowWiseAdagrad else numbers[n][1]) for n in held)
        assert table.optimizer_bytes == state, table
        assert (table.codebook_bytes, table.assignment_bytes) == (unsharded.codebook_bytes, unsharded.assignment_bytes)
        assert table.full_bytes == unsharded.full_bytes


@pytest.mark.parametrize("optimizer", [RowWiseAdagrad, torch.optim.Adagrad])
@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "row_wise", "column_wise"])
def test_memory_report_of_a_sharded_collection(ranks2: RankPool, places: str, optimizer: type) -> None:
    ranks2.run(check_report, places, optimizer)
