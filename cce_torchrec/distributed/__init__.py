"""Compressed collections across ranks: the sharder and the sharded collection."""

from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.distributed.sharder import CompressedEmbeddingBagCollectionSharder, get_sharders

__all__ = [
    "CompressedEmbeddingBagCollectionSharder",
    "ShardedCompressedEmbeddingBagCollection",
    "get_sharders",
]
