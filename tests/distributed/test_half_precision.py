"""Tables in float16, of every method, on two ranks: a step of training lands where that of float32 tables does.

There are no such tests of bfloat16: FBGEMM's lookups on the CPU do not have it.
"""

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.distributed.harness import RankPool
from tests.distributed.models import LEARNING_RATE, batch, mixed_tables
from tests.distributed.reference import whole_state
from tests.distributed.test_dense_parts import LossModel, distribute, registry_tables

pytestmark = pytest.mark.distributed

TABLES = {"rows": mixed_tables, "dense_parts": registry_tables}


def tables_of(kind: str, data_type: DataType) -> list[EmbeddingBagConfig]:
    tables = TABLES[kind]()
    for table in tables:
        table.data_type = data_type
    return tables


def check_step(rank: int, world_size: int, kind: str, places: str) -> None:
    """By SGD, whose steps are as exact as their gradients."""
    torch.manual_seed(0)
    model, reference = LossModel(tables_of(kind, DataType.FP16)), LossModel(tables_of(kind, DataType.FP32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    reference.load_state_dict(model.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    apply_optimizer_in_backward(torch.optim.SGD, model.collection.codebook_parameters(), {"lr": LEARNING_RATE})
    dmp = distribute(model, places)
    outside = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    batches = [batch(torch.Generator().manual_seed(r), 5) for r in range(world_size)]

    losses = [reference(features) for features in batches]
    torch.stack(losses).mean().backward()
    torch.optim.SGD(reference.parameters(), lr=LEARNING_RATE).step()
    loss = dmp(batches[rank])
    torch.testing.assert_close(loss, losses[rank], rtol=1e-3, atol=1e-3)
    loss.backward()
    if outside:
        torch.optim.SGD(outside.values(), lr=LEARNING_RATE).step()
    after = whole_state(dmp)
    for name, parameter in reference.named_parameters():
        assert after[name].dtype == torch.float16
        moved, expected = after[name].float() - before[name], parameter.detach() - before[name]
        assert expected.any(), name
        # Both the step and the number that it is added to are rounded to 2^-11 of themselves.
        torch.testing.assert_close(moved, expected, rtol=5e-3, atol=2**-10 * float(parameter.abs().max()), msg=name)


@pytest.mark.parametrize("places", ["row_wise", "table_wise", "data_parallel"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_step_in_float16(ranks2: RankPool, kind: str, places: str) -> None:
    ranks2.run(check_step, kind, places)
