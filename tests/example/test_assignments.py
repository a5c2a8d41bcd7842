"""Counts of assignments and their entropy, by brute force, on one rank and where ranks hold blocks of ids."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, recluster
from cce_torchrec.methods import CCE, CE, CCERobe, ResidualCCE
from cce_torchrec.methods.cce import CCERowMap
from dlrm_example import assignments
from dlrm_example.assignments import assignment_counts, entropy_bits
from tests.distributed.harness import RankPool
from tests.distributed.models import Model, mixed_tables, physical_tables, shard
from tests.distributed.test_replicated import places, tables_with


def by_hand(clusters_VC: Tensor, num_clusters: int) -> list[list[int]]:
    counters = [Counter(clusters_V.tolist()) for clusters_V in clusters_VC.T]
    return [[counter[cluster] for cluster in range(num_clusters)] for counter in counters]


def as_looked_up(row_map: CCERowMap) -> Tensor:
    """The main rows that lookups read, counted from their codebook's start: [V, columns * levels]."""
    return row_map.main_rows(torch.arange(row_map.num_embeddings)).T


def counts_by_table(model: torch.nn.Module) -> dict[str, list[list[int]]]:
    """Columns in the order in which they come."""
    found: dict[str, list[list[int]]] = {}
    for table, column, counts_K in assignment_counts(model):
        assert len(found.setdefault(table, [])) == column
        found[table].append(counts_K.tolist())
    return found


def test_counts_of_every_method_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignments, "_IDS_AT_ONCE", 64)
    methods = {
        "cce": CCE(num_rows=7, num_columns=4),
        "packed": CCE(num_rows=7, num_columns=4, bit_packed=True),
        "warm": CCE(num_rows=7, num_columns=4, num_assigned_ids=50),
        "warm and packed": ResidualCCE(num_rows=7, num_columns=2, num_assigned_ids=50, bit_packed=True),
        "hot": CCE(num_rows=7, num_columns=4, num_hot_ids=9),
        "residual": ResidualCCE(num_rows=5, num_levels=3, num_columns=2),
        "robe": CCERobe(num_cells=40, num_columns=4),
        "ce": CE(num_rows=7, num_columns=4),
    }
    tables = [
        CompressedEmbeddingBagConfig(
            name=name, num_embeddings=200, embedding_dim=16, feature_names=[name], method=method
        )
        for name, method in methods.items()
    ]
    collection = CompressedEmbeddingBagCollection(tables=tables)
    for _ in range(2):
        found = counts_by_table(torch.nn.Sequential(collection))
        row_maps = {table.name: table.row_map for table in collection.lowered_tables}
        robe = collection.decoded_tables[0].decoder
        assert found["cce"] == by_hand(row_maps["cce"].assignments, 7)
        assert found["residual"] == by_hand(row_maps["residual"].assignments, 5)
        for name in ("packed", "warm", "warm and packed", "hot"):
            assert found[name] == by_hand(as_looked_up(row_maps[name]), 7)
        assert found["robe"] == by_hand(robe.offsets, len(robe.memory))
        assert found.keys() == methods.keys() - {"ce"}
        recluster(collection, seed=1, id_weights={name: torch.ones(200) for name in ("warm", "warm and packed")})


def test_entropy() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [1, 3, 0, 0]])
    mixed = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert [entropy_bits(counts_K) for counts_K in counts] == pytest.approx([2.0, 0.0, 1.0, mixed])


def counts_of_blocks(rank: int, world_size: int) -> dict[str, list[list[int]]]:
    model = Model(tables_with("sharded"))
    dmp = shard(model, places(physical_tables(model.collection), None, world_size))
    return counts_by_table(dmp)


@pytest.mark.distributed
def test_counts_over_blocks_are_those_of_all_ids(ranks2: RankPool) -> None:
    expected = counts_by_table(Model(mixed_tables()))
    assert set(expected) == {"cce", "residual"}
    assert ranks2.run(counts_of_blocks) == [expected, expected]
