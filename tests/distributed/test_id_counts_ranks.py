"""Each rank counts its own ids, each batch once; together they choose the warm ids that one process would."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, ReclusterConfig, recluster
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.recluster.recorded import save_recorded
from tests.distributed.harness import RankPool
from tests.distributed.models import CPU, DIM, ON_2, Model, physical_tables, shard
from tests.distributed.reference import loss_of, whole_state

pytestmark = pytest.mark.distributed

V, SLOTS, LEAST, STEPS = 90, 20, 3, 6
COLLECTION = "model.sparse_arch.embedding_bag_collection"
CONFIG = ReclusterConfig(decode_batch_size=16)


def tables(least: int = LEAST) -> list[EmbeddingBagConfig]:
    method = CCE(num_rows=6, num_columns=2, num_assigned_ids=SLOTS, min_id_count=least)
    return [
        CompressedEmbeddingBagConfig(
            name="warm", num_embeddings=V, embedding_dim=DIM, feature_names=["f"], method=method
        ),
        CompressedEmbeddingBagConfig(
            name="all", num_embeddings=V, embedding_dim=DIM, feature_names=["g"], method=CCE(num_rows=5, num_columns=2)
        ),
    ]


def features_of(step: int, rank: int) -> KeyedJaggedTensor:
    """Skewed ids, other ones on the other rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    lengths = torch.randint(4, (2 * 8,), generator=generator)
    ids = (V * torch.rand(int(lengths.sum()), generator=generator) ** 2).long()
    return KeyedJaggedTensor(["f", "g"], V - 1 - ids if rank else ids, lengths=lengths)


def counts_of(steps: int, ranks: int) -> Counter[int]:
    found = (features_of(step, rank)["f"].values() for step in range(steps) for rank in range(ranks))
    return Counter(v for ids in found for v in ids.tolist())


def most_seen(counts: Counter[int]) -> list[int]:
    """By brute force: the largest counts, the lower of equal ids."""
    enough = [v for v in counts if counts[v] >= LEAST]
    return sorted(sorted(enough, key=lambda v: (-counts[v], v))[:SLOTS])


def counted(collection: Any) -> dict[int, int]:
    ids_U, counts_U1 = collection.id_counts.by_table["warm"].sums().sums()
    return dict(zip(ids_U.tolist(), counts_U1[:, 0].tolist(), strict=True))


def warm_ids(collection: Any) -> list[int]:
    warm = collection.lowered_tables[0].row_map.warm_ids
    return warm[warm >= 0].tolist()


def sharded(places: str, least: int = LEAST) -> Any:
    model = Model(tables(least))
    return shard(model, ON_2[places](physical_tables(model.collection)))


def check_counts(rank: int, world_size: int, places: str) -> None:
    """The same state as of an unsharded collection that has seen the batches of all ranks."""
    dmp, reference = sharded(places), Model(tables())
    reference.load_state_dict(whole_state(dmp))
    for group in dmp.fused_optimizer.param_groups:
        group["lr"] = 0.0  # what is looked up stays as it was
    dmp.fused_optimizer.zero_grad()
    for step in range(STEPS):
        loss_of(dmp(features_of(step, rank))).backward()
        for of_rank in range(world_size):
            reference(features_of(step, of_rank))
        dmp.eval()
        dmp(features_of(step, 1 - rank))  # evaluation does not count
        dmp.train()
    own = Counter(v for step in range(STEPS) for v in features_of(step, rank)["f"].values().tolist())
    assert counted(dmp.module.collection) == own
    recluster(dmp, seed=1, config=CONFIG)
    recluster(reference, seed=1, config=CONFIG)
    expected = most_seen(counts_of(STEPS, world_size))
    assert len(expected) == SLOTS
    assert warm_ids(dmp.module.collection) == expected != most_seen(own)
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", ["data_parallel", "row_wise", "mixed"])
def test_2_ranks_choose_the_ids_that_both_have_seen_most(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_counts, places)


def check_pipeline(rank: int, world_size: int, places: str) -> None:
    """With batches in flight whose rows become stale, and evaluation in between."""
    collection = CompressedEmbeddingBagCollection(tables())
    layers = {"dense_arch_layer_sizes": [8, DIM], "over_arch_layer_sizes": [8, 1]}
    model = DLRMTrain(DLRM(collection, dense_in_features=4, dense_device=CPU, **layers))
    dmp = shard(model, ON_2[places](physical_tables(collection)), paths=[COLLECTION])
    found = dmp.module.get_submodule(COLLECTION)
    optimizer = torch.optim.SGD([p for p in dmp.parameters() if p.is_leaf], lr=0.01)
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU, execute_all_batches=True)

    def run(batches: list[Batch], recluster_after: int) -> None:
        iterator = iter(batches)
        for completed in range(1, len(batches) + 1):
            pipeline.progress(iterator)
            if completed == recluster_after:
                recluster(dmp, seed=1, config=CONFIG, optimizer=optimizer)
                assert warm_ids(found) == most_seen(counts_of(completed, world_size))

    def batch_of(step: int) -> Batch:
        return Batch(torch.ones(8, 4), features_of(step, rank), torch.arange(8) % 2)

    run([batch_of(step) for step in range(STEPS)], recluster_after=4)
    dmp.eval()
    with torch.no_grad():
        run([batch_of(step) for step in range(STEPS)], recluster_after=0)
    dmp.train()
    run([batch_of(STEPS), batch_of(STEPS + 1)], recluster_after=0)
    own = Counter(v for step in range(STEPS + 2) for v in features_of(step, rank)["f"].values().tolist())
    assert counted(found) == own


@pytest.mark.parametrize("places", ["data_parallel", "row_wise"])
def test_a_pipeline_counts_each_batch_once(ranks2: RankPool, places: str) -> None:
    ranks2.run(check_pipeline, places)


def train(model: nn.Module, rank: int) -> None:
    for step in range(STEPS):
        model(features_of(step, rank))


def save(rank: int, world_size: int, folder: Path) -> None:
    dmp = sharded("row_wise")
    train(dmp, rank)
    save_checkpoint(folder, dmp)


def resume(rank: int, world_size: int, folder: Path, new_folder: Path) -> None:
    dmp = sharded("data_parallel")
    load_checkpoint(folder, dmp)
    train(dmp, rank)
    recluster(dmp, seed=1, config=CONFIG)
    counts = counts_of(STEPS, world_size)
    assert warm_ids(dmp.module.collection) == most_seen(counts + counts)
    save_checkpoint(new_folder, dmp)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_counts_come_back_from_a_checkpoint_on_any_number_of_ranks(ranks2: RankPool, tmp_path: Path) -> None:
    of_two, of_one, resumed = (tmp_path / name for name in ("of two", "of one", "resumed"))
    ranks2.run(save, of_two)
    alone = Model(tables())
    load_checkpoint(of_two, alone)
    assert counted(alone.collection) == counts_of(STEPS, 2)
    save_recorded(of_two, alone, rank=0, world_size=1)  # fewer ranks: no file of the others is left
    assert [file.name for file in of_two.glob("id_counts_*.pt")] == ["id_counts_0.pt"]
    save_checkpoint(of_one, alone)
    ranks2.run(resume, of_one, resumed)
    load_checkpoint(resumed, alone)
    assert counted(alone.collection) == counts_of(STEPS, 2) + counts_of(STEPS, 2)


def check_without_counts(rank: int, world_size: int) -> None:
    """Nothing seen is an error on all ranks; what one rank has seen is enough."""
    dmp = sharded("row_wise", least=1)
    before = whole_state(dmp)
    with pytest.raises(ValueError, match="'warm' stores assignments of the 20 ids seen most often"):
        recluster(dmp, seed=1)
    torch.testing.assert_close(whole_state(dmp), before, rtol=0, atol=0)
    lengths = torch.tensor([rank, 0])
    dmp(KeyedJaggedTensor(["f", "g"], torch.tensor([7][:rank], dtype=torch.int64), lengths=lengths))
    recluster(dmp, seed=1)
    assert warm_ids(dmp.module.collection) == [7]


def test_ranks_that_have_seen_nothing(ranks2: RankPool) -> None:
    ranks2.run(check_without_counts)
