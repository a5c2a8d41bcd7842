"""Sharded training equals unsharded training, for every sharding type and every row method in one collection.

Batch sizes differ between ranks, in all steps but the first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.distributed.harness import RankPool
from tests.distributed.models import (
    DATA_PARALLEL,
    EPS,
    LEARNING_RATE,
    NUM_IDS,
    ON_2,
    ON_4,
    ROWWISE_ADAGRAD,
    Model,
    Placement,
    batch,
    mixed_tables,
    physical_tables,
    shard,
)
from tests.distributed.reference import (
    RowwiseAdagrad,
    codebooks,
    dense_pooled,
    loss_of,
    train_step,
    whole_fused_sums,
    whole_optimizer_state,
    whole_state,
)

pytestmark = pytest.mark.distributed

STEPS = 5


@dataclass(frozen=True)
class Case:
    """What one comparison looks like."""

    places: str
    hosts: int = 1
    optimizer: str = "rowwise_adagrad"
    is_weighted: bool = False
    sign: bool = False

    def placements(self, names: list[str]) -> dict[str, Placement]:
        placements = (ON_2 if self.hosts == 1 else ON_4)[self.places](names)
        if self.optimizer == "rowwise_adagrad":
            return placements
        return {n: Placement(p.sharding_type, p.ranks, p.column_shards, "dense") for n, p in placements.items()}


def batches_of(step: int, world_size: int, case: Case, *, is_even: bool) -> list[KeyedJaggedTensor]:
    """The batches of all ranks; in one step rank 0 has only empty bags."""
    generator = torch.Generator().manual_seed(step)
    sizes = [4 + (0 if is_even else 3 * rank) for rank in range(world_size)]
    longest = [0 if (step, rank) == (2, 0) else 3 for rank in range(world_size)]
    return [
        batch(generator, size, is_weighted=case.is_weighted, longest=length)
        for size, length in zip(sizes, longest, strict=True)
    ]


def local_optimizer(dmp: nn.Module, names: list[str], optimizer: str) -> torch.optim.Optimizer | None:
    """What trains the tables that no fused kernel trains."""
    parameters = [parameter for name, parameter in codebooks(dmp).items() if name in names and parameter.numel()]
    if not parameters:
        return None
    if optimizer == "adam":
        return torch.optim.Adam(parameters, lr=LEARNING_RATE)
    return RowWiseAdagrad(parameters, lr=LEARNING_RATE, eps=EPS)


def assert_same_pooled(pooled: KeyedTensor, expected: KeyedTensor) -> None:
    assert sorted(pooled.keys()) == sorted(expected.keys())  # in the order of the ranks, as with TorchRec's own
    torch.testing.assert_close(pooled.to_dict(), expected.to_dict(), rtol=1e-4, atol=1e-5)


def check_parity(rank: int, world_size: int, case: Case) -> None:
    reference, model = (Model(mixed_tables(case.sign), is_weighted=case.is_weighted) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    placements = case.placements(physical_tables(model.collection))
    unfused = [name for name, place in placements.items() if place.kernel == "dense" or place == DATA_PARALLEL]
    fused_params = ROWWISE_ADAGRAD if case.optimizer == "rowwise_adagrad" else None
    dmp = shard(model, placements, fused_params=fused_params, local_size=world_size // case.hosts)
    ours = local_optimizer(dmp, unfused, case.optimizer)
    shards = {name: place.column_shards for name, place in placements.items()}
    theirs = (
        torch.optim.Adam(reference.parameters(), lr=LEARNING_RATE)
        if case.optimizer == "adam"
        else RowwiseAdagrad(reference, shards)
    )
    for step in range(STEPS):
        batches = batches_of(step, world_size, case, is_even=step == 0)
        expected = train_step(reference, batches)[rank]
        if ours is not None:
            ours.zero_grad()
        pooled = dmp(batches[rank])
        assert_same_pooled(pooled, expected)
        loss_of(pooled).backward()
        if ours is not None:
            ours.step()
        theirs.step()
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)
    if isinstance(theirs, RowwiseAdagrad):
        sums = whole_fused_sums(dmp) | whole_optimizer_state(dmp, ours, "sum")
        torch.testing.assert_close(sums, theirs.sums, rtol=1e-4, atol=1e-6)
        return
    for kind in ("exp_avg", "exp_avg_sq"):
        expected_moments = {name: theirs.state[weight][kind] for name, weight in codebooks(reference).items()}
        moments = whole_optimizer_state(dmp, ours, kind)
        torch.testing.assert_close(moments, expected_moments, rtol=1e-4, atol=1e-6)


def cases(hosts: int, places: Iterable[str]) -> list[Case]:
    return [Case(name, hosts, optimizer) for name in places for optimizer in ("rowwise_adagrad", "adam")]


@pytest.mark.parametrize("case", cases(1, ON_2), ids=lambda case: f"{case.places}-{case.optimizer}")
def test_training_on_2_ranks(ranks2: RankPool, case: Case) -> None:
    ranks2.run(check_parity, case)


@pytest.mark.parametrize("places", ["data_parallel", "table_wise", "column_wise", "row_wise", "mixed"])
def test_weighted_training_on_2_ranks(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_parity, Case(places, is_weighted=True))


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("places", ON_2)
def test_training_with_signs_on_2_ranks(ranks2: RankPool, places: str, is_weighted: bool) -> None:
    ranks2.run(check_parity, Case(places, is_weighted=is_weighted, sign=True))


NEED_4 = ["table_row_wise", "table_column_wise", "grid_shard", "row_wise", "mixed"]


@pytest.mark.parametrize("case", cases(2, NEED_4), ids=lambda case: f"{case.places}-{case.optimizer}")
def test_training_on_2_hosts(two_hosts: RankPool, case: Case) -> None:
    two_hosts.run(check_parity, case)


def test_weighted_training_on_2_hosts(two_hosts: RankPool) -> None:
    two_hosts.run(check_parity, Case("mixed", hosts=2, is_weighted=True))


def test_training_with_signs_on_2_hosts(two_hosts: RankPool) -> None:
    two_hosts.run(check_parity, Case("mixed", hosts=2, sign=True))


def test_the_reference_pools_right() -> None:
    for is_weighted in (False, True):
        collection = Model(is_weighted=is_weighted).collection
        features = batch(torch.Generator().manual_seed(0), 5, is_weighted=is_weighted)
        features.values().remainder_(min(size for size in NUM_IDS.values() if size))
        torch.testing.assert_close(collection(features).to_dict(), dense_pooled(collection, features))
