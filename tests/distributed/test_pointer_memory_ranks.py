"""Packed assignments, warm ids and growing tables on 2 ranks train and cluster as an unsharded collection."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import CompressedEmbeddingBagConfig, ReclusterConfig, recluster
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.methods import CCE, CE, ResidualCCE
from cce_torchrec.methods.base import RowMethod
from tests.distributed.harness import RankError, RankPool
from tests.distributed.models import (
    DATA_PARALLEL,
    DIM,
    EPS,
    LEARNING_RATE,
    ON_2,
    Model,
    Placement,
    physical_tables,
    row_wise,
    shard,
    table_wise,
)
from tests.distributed.reference import RowwiseAdagrad, codebooks, loss_of, train_step, whole_fused_sums, whole_state

pytestmark = pytest.mark.distributed

SIZES = {"packed": 101, "warm": 90, "both": 75, "residual": 47, "hot": 83, "ce": 1000, "plain": 57}
GROWN = {**SIZES, "packed": 133, "warm": 203, "both": 76, "residual": 49, "hot": 97, "ce": 1001}
SHARDED = ("packed", "residual", "hot")  # by id, where asked for
METHODS: dict[str, RowMethod] = {
    "packed": CCE(num_rows=5, num_columns=2, num_helper_rows=6, bit_packed=True),
    "warm": CCE(num_rows=6, num_columns=2, num_assigned_ids=100),
    "both": CCE(num_rows=9, num_columns=2, num_assigned_ids=20, bit_packed=True),
    "residual": ResidualCCE(num_rows=4, num_levels=3, num_columns=2, num_helper_rows=5, bit_packed=True),
    "hot": CCE(num_rows=5, num_columns=2, num_hot_ids=9),
    "ce": CE(num_rows=7, num_columns=2),
}


def tables(sizes: Mapping[str, int] = SIZES, sharded: tuple[str, ...] = ()) -> list[EmbeddingBagConfig]:
    compressed = [
        CompressedEmbeddingBagConfig(
            name=name,
            num_embeddings=sizes[name],
            embedding_dim=DIM,
            feature_names=[f"f_{name}"],
            method=method,
            assignment_placement="sharded" if name in sharded else "replicated",
        )
        for name, method in METHODS.items()
    ]
    plain = EmbeddingBagConfig(
        name="plain", num_embeddings=sizes["plain"], embedding_dim=DIM, feature_names=["f_plain"]
    )
    return [*compressed, plain]


def batch(seed: int, sizes: Mapping[str, int], batch_size: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (len(sizes) * batch_size,), generator=generator)
    counts = lengths.view(len(sizes), -1).sum(1).tolist()
    ids = [torch.randint(size, (n,), generator=generator) for size, n in zip(sizes.values(), counts, strict=True)]
    return KeyedJaggedTensor([f"f_{name}" for name in sizes], torch.cat(ids), lengths=lengths)


class _OptimizerState:
    """The sums of the reference's optimizer, as ``recluster`` looks for them."""

    def __init__(self, model: nn.Module, optimizer: RowwiseAdagrad) -> None:
        self.param_groups: list = []
        self.state = {weight: {"sum": optimizer.sums[name]} for name, weight in codebooks(model).items()}


def weights_of(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("packed", "warm", "both", "residual")
    return {name: torch.randint(5, (sizes[name],), generator=generator).double() + 0.5 for name in names}


class Pair:
    """A sharded model whose tables train in backward, and an unsharded one beside it."""

    def __init__(self, rank: int, world_size: int, places: dict[str, Placement], sharded: tuple[str, ...]) -> None:
        self.rank, self.world_size = rank, world_size
        self.reference, model = Model(tables()), Model(tables(sharded=sharded))
        parameters = model.collection.parameters()
        apply_optimizer_in_backward(RowWiseAdagrad, parameters, {"lr": LEARNING_RATE, "eps": EPS})
        model.load_state_dict(self.reference.state_dict())
        self.dmp: DistributedModelParallel = shard(model, places)
        self.optimizer = RowwiseAdagrad(self.reference, {})

    def train(self, sizes: Mapping[str, int], first: int, steps: int = 3) -> None:
        for step in range(first, first + steps):
            batches = [batch(100 * step + rank, sizes, 5 + 2 * rank) for rank in range(self.world_size)]
            expected = train_step(self.reference, batches)[self.rank]
            self.optimizer.step()
            pooled = self.dmp(batches[self.rank])
            torch.testing.assert_close(pooled.to_dict(), expected.to_dict(), rtol=1e-4, atol=1e-5)
            loss_of(pooled).backward()
        self.check()

    def recluster(self, sizes: Mapping[str, int], seed: int) -> None:
        config, weights = ReclusterConfig(optimizer_state="carry", decode_batch_size=16), weights_of(sizes, seed)
        holder = _OptimizerState(self.reference, self.optimizer)
        recluster(self.reference, seed=seed, config=config, id_weights=weights, optimizer=holder)  # type: ignore[arg-type]
        recluster(self.dmp, seed=seed, config=config, id_weights=weights)
        self.check()

    def check(self) -> None:
        theirs = dict(sorted(self.reference.state_dict().items()))
        torch.testing.assert_close(whole_state(self.dmp), theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole_fused_sums(self.dmp), self.optimizer.sums, rtol=1e-4, atol=1e-6)


def placed(kind: str) -> dict[str, Placement]:
    names = physical_tables(Model(tables()).collection)
    if kind not in ("mixed", "sharded ids"):
        return ON_2[kind](names)
    places, replicated = [row_wise(2), table_wise(1), DATA_PARALLEL], SHARDED if kind == "sharded ids" else ()
    return {n: DATA_PARALLEL if n.startswith(replicated) else places[i % 3] for i, n in enumerate(names)}


def check_training(rank: int, world_size: int, kind: str) -> None:
    pair = Pair(rank, world_size, placed(kind), SHARDED if kind == "sharded ids" else ())
    for part in range(3):
        pair.train(SIZES, 10 * part)
        pair.recluster(SIZES, part)
    for unsharded, table in zip(
        pair.reference.collection.memory_report().tables,
        pair.dmp.module.collection.memory_report().tables,
        strict=True,
    ):
        assert table.assignment_bytes == unsharded.assignment_bytes


@pytest.mark.parametrize("kind", ["data_parallel", "table_wise", "row_wise", "sharded ids"])
def test_packed_and_warm_tables_on_2_ranks(ranks2: RankPool, kind: str) -> None:
    ranks2.run(check_training, kind)


def check_growth(rank: int, world_size: int, kind: str) -> None:
    pair = Pair(rank, world_size, placed(kind), SHARDED if kind == "sharded ids" else ())
    pair.train(SIZES, 0)
    pair.recluster(SIZES, 1)
    before = {name: pair.reference.collection.dense_weight(name) for name in SIZES}
    for collection in (pair.reference.collection, pair.dmp.module.collection):
        for name, size in GROWN.items():
            if size != SIZES[name]:
                collection.grow(name, size)
    for name, old in before.items():
        assert torch.equal(pair.reference.collection.dense_weight(name)[: len(old)], old)
    pair.check()
    pair.train(GROWN, 20)
    pair.recluster(GROWN, 2)
    pair.train(GROWN, 30)


@pytest.mark.parametrize("kind", ["data_parallel", "table_wise", "row_wise", "mixed", "sharded ids"])
def test_a_grown_table_is_that_of_an_unsharded_collection(ranks2: RankPool, kind: str) -> None:
    ranks2.run(check_growth, kind)


def grow_differently(rank: int, world_size: int) -> None:
    model = Model(tables())
    dmp = shard(model, placed("data_parallel"))
    dmp.module.collection.grow("packed", SIZES["packed"] + 1 + rank)


def grow_with_other_seeds(rank: int, world_size: int) -> None:
    """What is stored of new ids is the same on all ranks, though they were configured differently."""
    configs = tables()
    configs[0].method = CCE(num_rows=5, num_columns=2, num_helper_rows=6, bit_packed=True, seed=rank)
    dmp = shard(Model(configs), placed("data_parallel"))
    dmp.module.collection.grow("packed", GROWN["packed"])
    whole_state(dmp)  # raises where replicas differ


def test_ranks_that_grow_differently_are_told(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match="Ranks would grow tables differently"):
        ranks2.run(grow_differently)


def test_growth_is_rank_0s(ranks2: RankPool) -> None:
    ranks2.run(grow_with_other_seeds)


def check_batches_in_flight(rank: int, world_size: int, kind: str) -> None:
    """Batches that were sent before the growth are looked up after it."""
    sharded = SHARDED if kind == "sharded ids" else ()
    reference, model = Model(tables()), Model(tables(sharded=sharded))
    model.load_state_dict(reference.state_dict())
    collection = shard(model, placed(kind)).module.collection
    batches = [batch(10 + rank, SIZES, 7), batch(20 + rank, SIZES, 9)]
    contexts = [collection.create_context() for _ in batches]
    received = [collection.input_dist(context, features) for context, features in zip(contexts, batches, strict=True)]
    received[0] = received[0].wait().wait()
    received[1] = received[1].wait()
    for name in ("packed", "warm", "residual"):
        collection.grow(name, GROWN[name])
        reference.collection.grow(name, GROWN[name])
    received[1] = received[1].wait()
    for context, kjts, features in zip(contexts, received, batches, strict=True):
        pooled = collection.compute_and_output_dist(context, kjts).wait()
        torch.testing.assert_close(pooled.to_dict(), reference(features).to_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "sharded ids"])
def test_batches_in_flight_are_looked_up_in_the_grown_table(ranks2: RankPool, kind: str) -> None:
    ranks2.run(check_batches_in_flight, kind)


def check_checkpoints(rank: int, world_size: int, folder: Path) -> None:
    """One from before the growth loads before it only, one from after it into a table that has all ids from the start."""

    def sharded(kind: str, sizes: Mapping[str, int] = SIZES) -> DistributedModelParallel:
        return shard(Model(tables(sizes)), placed(kind))

    def grow(dmp: DistributedModelParallel) -> None:
        for name in ("packed", "warm", "both", "residual", "hot", "ce"):
            dmp.module.collection.grow(name, GROWN[name])

    first = sharded("table_wise")
    recluster(first, seed=1, id_weights=weights_of(SIZES, 1))
    old = whole_state(first)
    save_checkpoint(folder / "old", first)
    grow(first)
    grown = whole_state(first)
    with pytest.raises(ValueError, match="if the vocabulary has grown, load first, then grow"):
        load_checkpoint(folder / "old", first)
    torch.testing.assert_close(whole_state(first), grown, rtol=0, atol=0)
    save_checkpoint(folder / "new", first)

    resumed = sharded("row_wise")
    load_checkpoint(folder / "old", resumed)
    torch.testing.assert_close(whole_state(resumed), old, rtol=0, atol=0)
    grow(resumed)
    torch.testing.assert_close(whole_state(resumed), grown, rtol=0, atol=0)
    roomy = sharded("data_parallel", GROWN)
    load_checkpoint(folder / "new", roomy)
    torch.testing.assert_close(whole_state(roomy), grown, rtol=0, atol=0)


def test_checkpoints_from_before_and_after_growth(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(check_checkpoints, tmp_path)
