"""What the planner is told of a step's cost, against the bytes and the times that were recorded on two ranks."""

import json
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption, Topology

from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressedPerfEstimator,
    CompressedStorageEstimator,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.planner.perf import sent
from tests.scripts import ROOT

RECORDED = json.loads((ROOT / "docs" / "results" / "sharded_step.json").read_text())
SIZES = RECORDED["sizes"]
KINDS = {
    "compressed DP": "data_parallel",
    "compressed TW": "table_wise",
    "compressed CW": "column_wise",
    "compressed RW": "row_wise",
}


def enumerate_all(kind: str, **more: Any) -> list[ShardingOption]:
    """The recorded tables under one sharding type."""
    tables = [
        CompressedEmbeddingBagConfig(
            name=f"t{i}",
            num_embeddings=SIZES["num_embeddings"],
            embedding_dim=SIZES["dim"],
            feature_names=[f"f{i}"],
            method=CCE(num_rows=SIZES["num_rows"], num_columns=SIZES["num_columns"]),
            **more,
        )
        for i in range(SIZES["num_tables"])
    ]
    model = nn.Sequential(CompressedEmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    topology = Topology(world_size=2, compute_device="cpu")
    wishes = {
        t.name: ParameterConstraints(sharding_types=[kind], min_partition=8, pooling_factors=[float(SIZES["bag"])])
        for t in tables
    }
    constraints = parameter_constraints(model, wishes)
    estimators = [
        CompressedPerfEstimator(topology, constraints),
        CompressedStorageEstimator(topology, constraints),
    ]
    enumerator = EmbeddingEnumerator(
        topology, batch_size=SIZES["batch_size"], constraints=constraints, estimator=estimators
    )
    return [o for o in enumerator.enumerate(model, get_sharders()) if o.compute_kernel in ("dense", "fused")]


def cost(options: list[ShardingOption]) -> float:
    return sum(shard.perf.total for option in options for shard in option.shards if shard.perf is not None)


def sent_a_rank(options: list[ShardingOption]) -> float:
    total = 0.0
    for option in options:
        collection = option.module[1]
        assert isinstance(collection, CompressedEmbeddingBagCollection)
        table = next(t for t in collection.lowered_tables if option.name in t.physical_names)
        bags, rows = SIZES["batch_size"], SIZES["batch_size"] * SIZES["bag"] * 2
        total += sum(sum(sent(option.sharding_type, s.size, table, 2, bags, rows)) for s in option.shards)
    return total / 2


@pytest.mark.parametrize("way", KINDS)
def test_bytes_are_those_that_were_counted(way: str) -> None:
    counted = RECORDED["bytes_sent_per_step_and_rank"][way]["total"]
    assert sent_a_rank(enumerate_all(KINDS[way])) == pytest.approx(counted, rel=1e-4)


def test_columns_cut_in_two_send_their_ids_twice() -> None:
    ids_and_lengths = SIZES["num_tables"] * SIZES["batch_size"] * (SIZES["bag"] + 1) * 8 / 2  # the half for other ranks
    more = sent_a_rank(enumerate_all("column_wise")) - sent_a_rank(enumerate_all("table_wise"))
    assert more == pytest.approx(ids_and_lengths)


def quartiles(way: str) -> tuple[float, float]:
    spread = RECORDED["ms_per_step"][way]
    return spread["low"], spread["high"]


def estimated() -> dict[str, float]:
    ways = {way: cost(enumerate_all(kind)) for way, kind in KINDS.items()}
    return ways | {"compressed, ids sharded": cost(enumerate_all("data_parallel", assignment_placement="sharded"))}


def test_ranked_as_measured() -> None:
    """Every two ways whose recorded times are further apart than their quartiles."""
    costs = estimated()
    apart = [(a, b) for a, b in permutations(costs, 2) if quartiles(a)[1] < quartiles(b)[0]]
    assert {frozenset(pair) for pair in apart} >= {
        frozenset({"compressed RW", other}) for other in costs if other != "compressed RW"
    }
    assert [(a, b) for a, b in apart if costs[a] >= costs[b]] == []
