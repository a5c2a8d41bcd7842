"""What the planner is told."""

import pytest
import torch
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import FullTable, MethodConfig
from dlrm_example.plan import _wishes


def collection(name: str, num_embeddings: int, method: MethodConfig) -> CompressedEmbeddingBagCollection:
    table = CompressedEmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=16, feature_names=["f"], method=method
    )
    return CompressedEmbeddingBagCollection(tables=[table], device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_tables_are_not_cut_by_rows_where_a_rank_would_get_none(world_size: int) -> None:
    """As many rows as TorchRec itself would give each rank."""
    for num_rows in range(1, 40):
        sizes, _ = calculate_shard_sizes_and_offsets(torch.empty(num_rows, 16), world_size, world_size, "row_wise")
        wishes = _wishes(collection("t", num_rows, FullTable()), world_size)
        assert ("t" in wishes) == any(rows == 0 for rows, _ in sizes), (num_rows, sizes)
        assert "t" not in wishes or "row_wise" not in (wishes["t"].sharding_types or [])
