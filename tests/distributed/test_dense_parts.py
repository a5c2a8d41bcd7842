"""Tables with dense parameters, decode methods and projections, train on ranks as on the whole batch at once.

The model ends in a loss, as any model does: DDP looks for tensors in what a model returns.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec import optim as torchrec_optim
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.types import ModuleSharder, ShardingEnv
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from cce_torchrec import (
    CCE,
    CE,
    METHODS,
    QR,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressedStorageReservation,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.config import method_of
from cce_torchrec.distributed import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.methods import DHE, ROBE, CCERobe, HashedNet, HashEmbedding, LowDim, TTRec
from tests.distributed import test_pipelines
from tests.distributed.harness import RankError, RankPool, run_ranks
from tests.distributed.models import CPU, EPS, LEARNING_RATE, ON_2, batch, physical_tables, shard
from tests.distributed.models import mixed_tables as row_tables
from tests.distributed.reference import loss_of, whole_state
from tests.toys import Thin, Waves

pytestmark = pytest.mark.distributed

STEPS = 4
ADAGRAD = {"lr": LEARNING_RATE, "eps": EPS}


def table(name: str, size: int, features: list[str], method, **more) -> CompressedEmbeddingBagConfig:
    return CompressedEmbeddingBagConfig(
        name=name, num_embeddings=size, embedding_dim=16, feature_names=features, method=method, **more
    )


def decode_tables() -> list[EmbeddingBagConfig]:
    """Shared features, two of one table, MEAN and SUM."""
    return [
        table("waves", 101, ["f", "g"], Waves(num_waves=5), pooling=PoolingType.MEAN),
        table("more_waves", 57, ["f"], Waves(num_waves=3)),
    ]


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Decode tables first, between and last."""
    waves, more_waves = decode_tables()
    return [
        waves,
        table("cce", 101, ["g", "h"], CCE(num_rows=5, num_columns=2, num_helper_rows=6)),
        table("thin", 1000, ["i", "k"], Thin(num_rows=12), pooling=PoolingType.MEAN),
        table("ce", 1000, ["k"], CE(num_rows=7, num_columns=2)),
        more_waves,
    ]


def registry_tables() -> list[EmbeddingBagConfig]:
    """Every method of the registry that has dense parameters, with a row method between; ids fit their features."""
    mean = {"pooling": PoolingType.MEAN}
    return [
        table("qr_mult", 53, ["h"], QR(num_remainders=8, operation="mult")),
        table("tt_rec", 101, ["f", "g"], TTRec(rank=3), **mean),
        table("dhe", 1000, ["i"], DHE(width=6, num_hashes=20)),
        table("dhe_layer", 1000, ["m"], DHE(width=6, num_hashes=20, norm="layer", encoding="gaussian"), **mean),
        table("low_dim", 50, ["j"], LowDim(dim=8)),
        table("hash_embedding", 1000, ["k", "g"], HashEmbedding(num_rows=11, num_weights=30), **mean),
        table("cce", 101, ["g", "h"], CCE(num_rows=5, num_columns=2, num_helper_rows=6)),
        table("low_dim_hashed", 1000, ["k"], LowDim(dim=8, num_rows=11), **mean),
        table("concat_weights", 1000, ["i"], HashEmbedding(num_rows=11, num_weights=30, concat_weights=True)),
        table("hashed_net", 1000, ["m"], HashedNet(num_cells=97), **mean),
        table("robe", 1000, ["k"], ROBE(num_cells=97, block_size=5, signed=True)),
        table("cce_robe", 37, ["o"], CCERobe(num_cells=53, num_columns=4, num_helper_cells=41), **mean),
    ]


TABLES = {"mixed": mixed_tables, "decode": decode_tables, "registry": registry_tables}


class LossModel(nn.Module):
    """A collection and what becomes of its outputs."""

    def __init__(self, tables: list[EmbeddingBagConfig], device: str = "cpu", is_weighted: bool = False) -> None:
        super().__init__()
        self.collection = CompressedEmbeddingBagCollection(tables, is_weighted=is_weighted, device=device)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return loss_of(self.collection(features))


def apply_optimizers(model: LossModel, dense: str) -> None:
    """Codebooks are trained in backward, and where asked for, dense parameters as well."""
    parameters = model.collection.parameters() if dense == "in_backward" else model.collection.codebook_parameters()
    apply_optimizer_in_backward(torch.optim.Adagrad, parameters, dict(ADAGRAD))  # TorchRec adds to it


def outside_optimizer(dmp: nn.Module) -> torch.optim.Optimizer | None:
    rest = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    return torch.optim.Adagrad(rest.values(), **ADAGRAD) if rest else None


def batches_of(step: int, world_size: int, is_weighted: bool = False) -> list[KeyedJaggedTensor]:
    """The batches of all ranks; in one step rank 0 has no ids at all."""
    generator = torch.Generator().manual_seed(step)
    longest = [0 if (step, rank) == (1, 0) else 3 for rank in range(world_size)]
    return [batch(generator, 5, longest=length, is_weighted=is_weighted) for length in longest]


def plan_by_planner(model: nn.Module) -> DistributedModelParallel:
    """As users do it."""
    group = torch.distributed.group.WORLD
    sharders: list[ModuleSharder[nn.Module]] = get_sharders()
    planner = EmbeddingShardingPlanner(
        constraints=parameter_constraints(model), storage_reservation=CompressedStorageReservation()
    )
    plan = planner.collective_plan(model, sharders, group)
    env = ShardingEnv.from_process_group(group)
    return DistributedModelParallel(model, env=env, device=CPU, plan=plan, sharders=sharders)


def distribute(model: LossModel, places: str) -> DistributedModelParallel:
    if places == "planned":
        return plan_by_planner(model)
    return shard(model, ON_2[places](physical_tables(model.collection)))


@contextmanager
def in_backward_without_accelerator() -> Iterator[None]:
    """Let DDP step optimizers in backward on the CPU too: all that it lacks is a stream to wait for at the end."""
    accelerator = "torch.accelerator"
    with mock.patch(f"{accelerator}.current_stream"), mock.patch(f"{accelerator}.is_available", return_value=True):
        yield


def check_training(rank: int, world_size: int, dense: str, *case: Any) -> None:
    with in_backward_without_accelerator() if dense == "in_backward" else nullcontext():
        compare_training(rank, world_size, dense, *case)


def compare_training(
    rank: int, world_size: int, dense: str, kind: str, places: str, device: str, weighted: bool
) -> None:
    torch.manual_seed(rank)  # replicas must be rank 0's nevertheless
    tables = TABLES[kind]
    model, reference = LossModel(tables(), device, weighted), LossModel(tables(), is_weighted=weighted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "._decoders." in name}
    apply_optimizers(model, dense)
    dmp = distribute(model, places)
    is_sharded = isinstance(dmp.module.collection, ShardedCompressedEmbeddingBagCollection)
    assert is_sharded == (kind != "decode")
    state = whole_state(dmp)
    reference.load_state_dict(state)
    if device == "cpu" and rank == 0:  # what is replicated is rank 0's
        torch.testing.assert_close({n: state[n] for n in before}, before, rtol=0, atol=0)
    if device == "meta":
        fresh = LossModel(tables()).collection
        for name in (table.name for table in fresh.decoded_tables):
            std = fresh.dense_weight(name).std()
            torch.testing.assert_close(reference.collection.dense_weight(name).std(), std, rtol=0.4, atol=0)
        for name, buffer in fresh.named_buffers():
            assert torch.equal(state[f"collection.{name}"], buffer), name
    ours, theirs = outside_optimizer(dmp), torch.optim.Adagrad(reference.parameters(), **ADAGRAD)
    assert (ours is None) == (dense == "in_backward")
    for step in range(STEPS):
        batches = batches_of(step, world_size, weighted)
        theirs.zero_grad()
        losses = [reference(features) for features in batches]
        torch.stack(losses).mean().backward()
        theirs.step()
        if ours is not None:
            ours.zero_grad()
        loss = dmp(batches[rank])
        torch.testing.assert_close(loss, losses[rank], rtol=1e-4, atol=1e-5)
        loss.backward()
        if ours is not None:
            ours.step()
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-4, atol=1e-5)
    moved = [n for n, t in reference.state_dict().items() if t.is_floating_point() and not torch.equal(t, state[n])]
    assert {name for name, _ in reference.named_parameters()} == set(moved)


CASES = [
    ("dense", "mixed", "row_wise", "cpu", False),
    ("dense", "mixed", "table_wise", "cpu", True),
    ("dense", "mixed", "column_wise", "meta", False),
    ("dense", "mixed", "mixed", "meta", True),
    ("dense", "mixed", "planned", "cpu", False),
    ("dense", "decode", "planned", "cpu", True),
    ("dense", "decode", "planned", "meta", False),
    ("dense", "registry", "row_wise", "cpu", False),
    ("dense", "registry", "mixed", "cpu", True),
    ("dense", "registry", "planned", "meta", False),
    ("in_backward", "mixed", "table_wise", "cpu", False),
    ("in_backward", "mixed", "data_parallel", "meta", True),
    ("in_backward", "decode", "planned", "cpu", False),
    ("in_backward", "decode", "planned", "meta", True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_training_on_2_ranks(ranks2: RankPool, case: tuple[str, str, str, str, bool]) -> None:
    ranks2.run(check_training, *case)


def test_every_method_is_trained_on_ranks() -> None:
    tables = [*registry_tables(), *row_tables()]
    assert {method_of(table).key for table in tables} == set(METHODS)
    assert [table.name for table in registry_tables() if not LossModel([table]).collection._decoders] == ["cce"]


def check_names(rank: int, world_size: int) -> None:
    model = LossModel(mixed_tables())
    before = set(model.state_dict())
    dmp = distribute(model, "mixed")
    collection = dmp.module.collection
    dense = {name for name, _ in collection.named_parameters() if name.startswith("_decoders.")}
    assert len(dense) == 2 * 2 + 1
    everything = {name for name, _ in [*collection.named_parameters(), *collection.named_buffers()]}
    assert everything - set(collection.sharded_parameter_names()) == dense
    assert set(dmp.state_dict()) == before
    features = batch(torch.Generator().manual_seed(rank), 3)
    keys = collection(features).keys()
    assert keys[-3:] == ["f@waves", "g@waves", "f@more_waves"]  # rows' in the order of the ranks, then these


def test_names_of_parameters_and_outputs(ranks2: RankPool) -> None:
    ranks2.run(check_names)


def check_pipeline(rank: int, world_size: int, kind: str, places: str) -> None:
    """A DLRM with such tables, re-clustered while the pipeline holds batches."""

    def build() -> DLRMTrain:
        tables = [
            table("waves", 10, ["unused"], Waves(num_waves=5), pooling=PoolingType.MEAN),
            table("cce", 101, ["f", "g"], CCE(num_rows=5, num_columns=2, num_helper_rows=6)),
            table("thin", 1000, ["k"], Thin(num_rows=12)),
        ]
        return DLRMTrain(DLRM(CompressedEmbeddingBagCollection(tables), 4, [8, 16], [8, 1], dense_device=CPU))

    reference, model = build(), build()
    model.load_state_dict(reference.state_dict())
    seeds = test_pipelines.RECLUSTER_AFTER
    of_ranks = test_pipelines.reference_losses(reference, world_size, places, seeds)
    dmp, optimizer = test_pipelines.shard_and_optimize(model.train(), places)
    losses = test_pipelines.train_losses(rank, dmp, optimizer, kind, test_pipelines.recluster_if_due)
    expected = [step[rank] for step in of_ranks]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole_state(dmp), dict(sorted(reference.state_dict().items())), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("places", ["row_wise", "data_parallel"])
@pytest.mark.parametrize("kind", test_pipelines.PIPELINES)
def test_pipelines_with_decode_tables(ranks2: RankPool, kind: str, places: str) -> None:
    ranks2.run(check_pipeline, kind, places)


def train(dmp: nn.Module, rank: int, steps: range) -> None:
    for step in steps:
        dmp(batches_of(step, 2)[rank]).backward()


def train_and_save(rank: int, world_size: int, path: str, kind: str) -> list[dict[str, Tensor]]:
    """What is saved, and what two more steps make of it."""
    with in_backward_without_accelerator():
        dmp = in_backward_dmp(kind, "cpu")
        train(dmp, rank, range(2))
        save_checkpoint(path, dmp, dmp.fused_optimizer)
        saved = whole_state(dmp)
        train(dmp, rank, range(2, 4))
        return [saved, whole_state(dmp)]


def load_and_train(rank: int, world_size: int, path: str, kind: str) -> list[dict[str, Tensor]]:
    with in_backward_without_accelerator():
        dmp = in_backward_dmp(kind, "meta")
        load_checkpoint(path, dmp, dmp.fused_optimizer)
        loaded = whole_state(dmp)
        train(dmp, rank, range(2, 4))
        return [loaded, whole_state(dmp)]


def in_backward_dmp(kind: str, device: str) -> DistributedModelParallel:
    model = LossModel(TABLES[kind](), device)
    apply_optimizers(model, "in_backward")
    return plan_by_planner(model)


@pytest.mark.parametrize("kind", TABLES)
def test_a_checkpoint_goes_on_as_if_uninterrupted(ranks2: RankPool, tmp_path: Path, kind: str) -> None:
    saved, expected = ranks2.run(train_and_save, str(tmp_path), kind)[0]
    torch.testing.assert_close(ranks2.run(load_and_train, str(tmp_path), kind)[0], [saved, expected])
    torch.testing.assert_close(run_ranks(1, load_and_train, str(tmp_path), kind)[0][0], saved)


def check_refused(rank: int, world_size: int, optimizer: type, with_accelerator: bool) -> None:
    model = LossModel(mixed_tables())
    apply_optimizer_in_backward(optimizer, model.collection._decoders.parameters(), {"lr": 0.1})
    with in_backward_without_accelerator() if with_accelerator else nullcontext():
        distribute(model, "table_wise")


def test_an_optimizer_that_cannot_step_is_an_error(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match="'thin' has dense parameters, to which LAMB cannot be applied in backward"):
        ranks2.run(check_refused, torchrec_optim.LAMB, True)
    with pytest.raises(RankError, match=r"of table 'thin', and .* on accelerators only: .*codebook_parameters"):
        ranks2.run(check_refused, torch.optim.SGD, False)


def check_nothing_to_shard(rank: int, world_size: int) -> None:
    collection = CompressedEmbeddingBagCollection(decode_tables())
    get_sharders()[0].shard(collection, {}, ShardingEnv.from_process_group(torch.distributed.group.WORLD), CPU)


def test_nothing_to_shard_is_an_error(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"decode tables only \(\['waves', 'more_waves'\]\)"):
        ranks2.run(check_nothing_to_shard)
