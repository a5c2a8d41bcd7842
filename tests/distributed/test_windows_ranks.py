"""Re-clustering CCE on circular memory: 2 ranks give what one process gives, in replicas and in a sharded model."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig

from cce_torchrec import CompressedEmbeddingBagConfig, ReclusterConfig, recluster
from cce_torchrec.methods import CCE, ROBE, CCERobe
from cce_torchrec.recluster import windows as windows_module
from tests.distributed.harness import RankPool
from tests.distributed.models import DIM, EPS, LEARNING_RATE, ROWWISE_ADAGRAD, Model, batch, row_wise, shard
from tests.distributed.reference import loss_of, whole_state

pytestmark = pytest.mark.distributed

CONFIG = ReclusterConfig(decode_batch_size=100, points_per_centroid=4, num_iterations=8)  # several batches, a sample
RESET = dataclasses.replace(CONFIG, optimizer_state="reset")
PREFIX = "collection._decoders."


def tables(with_rows: bool) -> list[EmbeddingBagConfig]:
    def table(name: str, size: int, feature: str, method: Any) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=DIM, feature_names=[feature], method=method
        )

    decoded = [
        table("a", 1001, "f", CCERobe(num_cells=300, num_columns=4)),  # two-byte offsets, which gloo does not know
        table("robe", 57, "h", ROBE(num_cells=100, block_size=5)),
        table("b", 203, "g", CCERobe(num_cells=50, num_columns=2, num_helper_cells=64)),
    ]
    return [table("rows", 101, "l", CCE(num_rows=7, num_columns=2)), *decoded] if with_rows else decoded


def trained_model(with_rows: bool) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(tables(with_rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=EPS)
    loss_of(model(batch(torch.Generator().manual_seed(1), 20))).backward()
    optimizer.step()
    return model, optimizer


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, reports: list) -> tuple[dict[str, Tensor], list]:
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name in sorted(name for name in parameters if "_decoders." in name):
        for kind, value in optimizer.state[parameters[name]].items():
            state[f"{name}/{kind}"] = value.clone()
    numbers = [(t.table, t.version, t.relative_squared_error, t.moved_fraction) for r in reports for t in r.tables]
    return state, numbers


def clustered(config: ReclusterConfig, process_group: Any = None) -> tuple[dict[str, Tensor], list]:
    model, optimizer = trained_model(with_rows=True)
    options = {"config": config, "optimizer": optimizer, "process_group": process_group}
    reports = [recluster(model, seed=seed, **options) for seed in (1, 2)]
    return outcome(model, optimizer, reports)


def assert_same(ours: tuple[dict[str, Tensor], list], theirs: tuple[dict[str, Tensor], list]) -> None:
    for name, value in theirs[0].items():
        if name.endswith(("offsets", "assignments")):
            assert (ours[0][name] == value).float().mean() >= 0.999, name  # ties may fall differently
        else:
            torch.testing.assert_close(ours[0][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for mine, expected in zip(ours[1], theirs[1], strict=True):
        assert mine[:2] == expected[:2]
        assert mine[2:] == pytest.approx(expected[2:], rel=1e-3)


def cluster_replicas(rank: int, world_size: int, config: ReclusterConfig) -> Any:
    return clustered(config, dist.group.WORLD)


@pytest.mark.parametrize("config", [RESET, CONFIG], ids=lambda config: config.optimizer_state)
def test_2_replicas_cluster_as_one(ranks2: RankPool, config: ReclusterConfig) -> None:
    expected = clustered(config)
    results = ranks2.run(cluster_replicas, config)
    for result in results:
        assert_same(result, expected)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]


def cluster_sharded(rank: int, world_size: int, with_rows: bool) -> Any:
    model, _ = trained_model(with_rows)
    placements = {f"rows:{column}": row_wise(world_size) for column in range(2)} if with_rows else {}
    dmp = shard(model, placements, fused_params=ROWWISE_ADAGRAD)
    reports = [recluster(dmp, seed=seed, config=CONFIG) for seed in (1, 2)]
    return whole_state(dmp), [t.relative_squared_error for report in reports for t in report.tables]


@pytest.mark.parametrize("with_rows", [True, False], ids=["beside_rows", "alone"])
def test_2_sharded_ranks_cluster_as_one(ranks2: RankPool, with_rows: bool) -> None:
    model, _ = trained_model(with_rows)
    errors = [t.relative_squared_error for seed in (1, 2) for t in recluster(model, seed=seed, config=CONFIG).tables]
    for state, ours in ranks2.run(cluster_sharded, with_rows):
        assert ours == pytest.approx(errors, rel=1e-4)
        for name, value in model.state_dict().items():
            if name.endswith("offsets"):
                assert (state[name] == value).float().mean() >= 0.999
            elif name.startswith(PREFIX):
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def fail_on_one_rank(rank: int, world_size: int, failing_call: int) -> int:
    model, optimizer = trained_model(with_rows=True)
    before = outcome(model, optimizer, [])[0]
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == failing_call:
            raise MemoryError("a cat on the keyboard")
        return nearest_windows(*args, **kwargs)

    nearest_windows = windows_module.nearest_windows
    with (
        mock.patch.object(windows_module, "nearest_windows", side_effect=counting),
        pytest.raises(RuntimeError, match="rank 1: MemoryError: a cat on the keyboard"),
    ):
        recluster(model, seed=1, config=CONFIG, optimizer=optimizer, process_group=dist.group.WORLD)
    after = outcome(model, optimizer, [])[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    return calls


@pytest.mark.parametrize("failing_call", [2, 7])  # in the first decode table; in the second one, when the first is done
def test_one_rank_fails_and_nothing_changes(ranks2: RankPool, failing_call: int) -> None:
    assert ranks2.run(fail_on_one_rank, failing_call)[1] == failing_call
