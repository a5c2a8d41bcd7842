"""Decode tables in batches at the edge."""

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import DHE, ROBE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import MethodConfig


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("method", [DHE.from_budget(50, 8, 400), ROBE.from_budget(50, 8, 100)], ids=["dhe", "robe"])
def test_a_batch_without_samples(method: MethodConfig, pooling: PoolingType) -> None:
    """Such as the last one of a rank that has fewer rows; gradients are zero, but there are some for DDP to reduce."""
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=50, embedding_dim=8, feature_names=["f", "g"], method=method, pooling=pooling
    )
    collection = CompressedEmbeddingBagCollection(tables=[table])
    nothing = torch.empty(0, dtype=torch.int64)
    pooled = collection(KeyedJaggedTensor(["f", "g"], nothing, lengths=nothing, stride=0))
    assert pooled.values().shape == (0, 16)
    pooled.values().sum().backward()
    for parameter in collection.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
