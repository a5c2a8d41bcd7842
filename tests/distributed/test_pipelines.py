"""TorchRec's pipelines with re-clusterings in the middle: losses equal those of an unsharded, unpipelined run.

A pipeline has computed rows of the next batch when it returns, so a re-clustering between two calls of ``progress`` finds a
batch in flight whose rows are stale; its forward, one call later, must use the new ones. The reference re-clusters after
the same number of optimizer steps and never holds a batch.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import train_pipelines
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    HashingTrick,
    ReclusterConfig,
    ReclusterSchedule,
    recluster,
)
from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from tests.distributed.harness import RankPool
from tests.distributed.models import (
    CPU,
    EPS,
    LEARNING_RATE,
    ON_2,
    ROWWISE_ADAGRAD,
    batch,
    mixed_tables,
    physical_tables,
    shard,
)
from tests.distributed.reference import RowwiseAdagrad, whole_state

pytestmark = pytest.mark.distributed

COLLECTION = "model.sparse_arch.embedding_bag_collection"
STEPS = 8
# The reference's optimizer is by hand, and starts anew where rows are rewritten.
RESET = ReclusterConfig(optimizer_state="reset")
RECLUSTER_AFTER = {2: 12, 3: 13, 6: 16}  # completed optimizer steps (two in a row, too), and the seeds
DENSE_LEARNING_RATE = 0.1
PIPELINES: dict[str, Callable[..., Any]] = {
    "base": train_pipelines.TrainPipelineBase,
    "sparse_dist": lambda *args: train_pipelines.TrainPipelineSparseDist(*args, execute_all_batches=True),
    "sparse_dist_lite": train_pipelines.TrainPipelineSparseDistLite,
}


def build(sign: bool = False) -> DLRMTrain:
    """A small DLRM whose features belong to one table each, as it wants them; at will with a sign hash."""
    tables = [table for table in mixed_tables() if table.name not in ("plain", "hashed")]
    if sign:
        method, pooling = HashingTrick(num_rows=11, sign=True), PoolingType.MEAN
        fields = {"num_embeddings": 1000, "embedding_dim": 16, "feature_names": ["k"], "pooling": pooling}
        tables.append(CompressedEmbeddingBagConfig(name="signed", method=method, **fields))
    tables.append(EmbeddingBagConfig(name="plain", num_embeddings=60, embedding_dim=16, feature_names=["unused"]))
    collection = CompressedEmbeddingBagCollection(tables)
    return DLRMTrain(
        DLRM(
            collection,
            dense_in_features=4,
            dense_arch_layer_sizes=[8, 16],
            over_arch_layer_sizes=[8, 1],
            dense_device=CPU,
        )
    )


def batch_of(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    features = batch(generator, 6)
    return Batch(torch.randn(6, 4, generator=generator), features, torch.randint(0, 2, (6,), generator=generator))


def is_codebook(name: str) -> bool:
    return "embedding_bags." in name


def column_shards(model: DLRMTrain, places: str) -> dict[str, int]:
    names = physical_tables(model.get_submodule(COLLECTION))
    return {name: place.column_shards for name, place in ON_2[places](names).items()}


def reference_losses(model: DLRMTrain, world_size: int, places: str, seeds: dict[int, int]) -> list[list[float]]:
    """Losses by step and rank; the codebooks by our own row-wise Adagrad, the rest by SGD."""
    dense = torch.optim.SGD([p for n, p in model.named_parameters() if not is_codebook(n)], lr=DENSE_LEARNING_RATE)
    sparse = RowwiseAdagrad(model, column_shards(model, places))
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        of_ranks = [model(batch_of(step, rank))[0] for rank in range(world_size)]
        (torch.stack(of_ranks).mean()).backward()
        dense.step()
        sparse.step()
        losses.append([loss.item() for loss in of_ranks])
        if step + 1 in seeds:
            recluster(model, seed=seeds[step + 1], config=RESET)
            for name, sums in sparse.sums.items():
                if name.startswith(("cce:", "residual:")):
                    sums.zero_()
    return losses


def shard_and_optimize(model: DLRMTrain, places: str) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    names = physical_tables(model.get_submodule(COLLECTION))
    dmp = shard(model, ON_2[places](names), fused_params=ROWWISE_ADAGRAD, paths=[COLLECTION])
    others = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    books = {name: parameter for name, parameter in others.items() if is_codebook(name)}
    dense = {name: parameter for name, parameter in others.items() if name not in books}
    optimizers = [
        ("fused", dmp.fused_optimizer),
        ("dense", KeyedOptimizerWrapper(dense, lambda p: torch.optim.SGD(p, lr=DENSE_LEARNING_RATE))),
    ]
    if books:
        replicas = KeyedOptimizerWrapper(books, lambda p: RowWiseAdagrad(p, lr=LEARNING_RATE, eps=EPS))
        optimizers.append(("replicas", replicas))
    return dmp, CombinedOptimizer(optimizers)


@contextmanager
def pipeline_log() -> Iterator[list[str]]:
    """What TorchRec's pipelines log."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("torchrec.distributed.train_pipeline")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def assert_pipelined(pipeline: Any, messages: list[str]) -> None:
    (pipelined,) = pipeline._pipelined_modules
    assert isinstance(pipelined, ShardedCompressedEmbeddingBagCollection)
    assert pipelined.is_pipelined
    assert any(COLLECTION in message and "will be pipelined" in message for message in messages)
    bad = ("not be pipelined", "cannot be pipelined", "potentially modifies", "can't be handled")
    assert not [message for message in messages if any(text in message.lower() for text in bad)]


def recluster_if_due(completed_steps: int, dmp: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
    if completed_steps in RECLUSTER_AFTER:
        recluster(dmp, seed=RECLUSTER_AFTER[completed_steps], config=RESET, optimizer=optimizer)


def train_losses(
    rank: int, dmp: DistributedModelParallel, optimizer: CombinedOptimizer, kind: str, after_step: Callable[..., Any]
) -> list[float]:
    with pipeline_log() as messages:
        pipeline = PIPELINES[kind](dmp, optimizer, CPU)
        batches = iter([batch_of(step, rank) for step in range(STEPS)])
        losses = []
        while True:
            try:
                loss, *_ = pipeline.progress(batches)
            except StopIteration:
                break
            losses.append(loss.item())
            after_step(len(losses), dmp, optimizer=optimizer)
    if kind != "base":
        assert_pipelined(pipeline, messages)
    return losses


def run_both(
    rank: int,
    world_size: int,
    kind: str,
    places: str,
    *,
    seeds: dict[int, int] = RECLUSTER_AFTER,
    after_step: Callable[..., Any] = recluster_if_due,
    state_agrees: bool = True,
    sign: bool = False,
) -> float:
    """The largest difference in loss to the reference; the state at the end must agree as well."""
    reference, model = build(sign), build(sign)
    model.load_state_dict(reference.state_dict())
    expected = [of_ranks[rank] for of_ranks in reference_losses(reference, world_size, places, seeds)]
    dmp, optimizer = shard_and_optimize(model.train(), places)
    losses = train_losses(rank, dmp, optimizer, kind, after_step)
    assert len(losses) == STEPS
    if state_agrees:
        state = dict(sorted(reference.state_dict().items()))
        torch.testing.assert_close(whole_state(dmp), state, rtol=1e-3, atol=1e-4)
    return float((torch.tensor(losses) - torch.tensor(expected)).abs().max())


@pytest.mark.parametrize("places", ["row_wise", "table_wise", "data_parallel", "mixed"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_losses_equal_the_unpipelined_run(ranks2: RankPool, kind: str, places: str) -> None:
    assert max(ranks2.run(run_both, kind, places)) < 1e-5


def run_signed(rank: int, world_size: int, places: str) -> float:
    return run_both(rank, world_size, "sparse_dist", places, sign=True)


@pytest.mark.parametrize("places", ["row_wise", "table_wise", "data_parallel", "mixed"])
def test_losses_with_signs(ranks2: RankPool, places: str) -> None:
    assert max(ranks2.run(run_signed, places)) < 1e-5


def run_scheduled(rank: int, world_size: int, places: str) -> float:
    # The reference's loss is a mean over ranks, so gradients recorded of it are smaller: see test_id_gradients_ranks.
    schedule = ReclusterSchedule(
        total_steps=STEPS, count=2, stop_after_fraction=0.8, gradient_steps=0, seed=5, config=RESET
    )
    seeds = {3: 5 * 1_000_003 + 3, 6: 5 * 1_000_003 + 6}
    return run_both(rank, world_size, "sparse_dist", places, seeds=seeds, after_step=schedule.step)


@pytest.mark.parametrize("places", ["row_wise", "data_parallel"])
def test_a_schedule_drives_it_without_draining(ranks2: RankPool, places: str) -> None:
    assert max(ranks2.run(run_scheduled, places)) < 1e-5


def stale_rows_matter(rank: int, world_size: int) -> float:
    with mock.patch.object(ShardedCompressedEmbeddingBagCollection, "assignments_changed"):
        return run_both(rank, world_size, "sparse_dist", "row_wise", state_agrees=False)


def test_the_comparison_sees_stale_rows(ranks2: RankPool) -> None:
    assert min(ranks2.run(stale_rows_matter)) > 1e-3


def predictions(reference: DLRMTrain, rank: int) -> list[Tensor]:
    results = []
    for step in range(STEPS):
        with torch.no_grad():
            results.append(reference(batch_of(step, rank))[1][1])
        if step + 1 in RECLUSTER_AFTER:
            recluster(reference, seed=RECLUSTER_AFTER[step + 1], config=RESET)
    return results


def check_eval(rank: int, world_size: int, places: str, detach_after: int) -> None:
    reference, model = build().eval(), build().eval()
    model.load_state_dict(reference.state_dict())
    dmp, optimizer = shard_and_optimize(model, places)
    dmp.eval()
    expected = predictions(reference, rank)
    with pipeline_log() as messages, torch.no_grad():
        kind = PIPELINES["sparse_dist"] if detach_after else train_pipelines.EvalPipelineSparseDist
        pipeline = kind(dmp, optimizer, CPU)
        batches = iter([batch_of(step, rank) for step in range(STEPS)])
        for completed in range(1, STEPS + 1):
            _, logits, _ = pipeline.progress(batches)
            torch.testing.assert_close(logits, expected[completed - 1], rtol=1e-4, atol=1e-5)
            if completed == detach_after:
                pipeline.detach()  # the next call of progress attaches it again
                dmp(batch_of(0, rank))
            if completed in RECLUSTER_AFTER:
                recluster(dmp, seed=RECLUSTER_AFTER[completed], config=RESET)
        with pytest.raises(StopIteration):
            pipeline.progress(batches)
    assert_pipelined(pipeline, messages)
    assert not torch.allclose(expected[0], expected[-1])


@pytest.mark.parametrize("places", ["row_wise", "table_wise", "data_parallel", "mixed"])
def test_evaluation_equals_the_unpipelined_run(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_eval, places, 0)


@pytest.mark.parametrize("detach_after", [3, 4])
@pytest.mark.parametrize("places", ["row_wise", "mixed"])
def test_a_pipeline_detached_in_between(ranks2: RankPool, places: str, detach_after: int) -> None:
    """Without and with a re-clustering before it goes on. Only evaluation: TorchRec's dense replicas drift apart when it
    trains on after being attached again, with a plain ``EmbeddingBagCollection`` too.
    """
    ranks2.run(check_eval, places, detach_after)
