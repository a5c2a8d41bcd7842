"""Compressed embedding tables for TorchRec: CCE and its siblings as sharded embedding-bag collections."""

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import CompressedEmbeddingBagConfig
from cce_torchrec.distributed import (
    CompressedEmbeddingBagCollectionSharder,
    ShardedCompressedEmbeddingBagCollection,
    get_sharders,
)
from cce_torchrec.memory import MemoryReport
from cce_torchrec.methods import CCE, CE, METHODS, PQ, QR, Bloom, FullTable, HashingTrick, ResidualCCE
from cce_torchrec.planner import CompressedStorageReservation, parameter_constraints
from cce_torchrec.recluster import ReclusterConfig, ReclusterReport, ReclusterSchedule, recluster
from cce_torchrec.swap import CompressionRule, compress

__all__ = [
    "CCE",
    "CE",
    "METHODS",
    "PQ",
    "QR",
    "Bloom",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingBagCollectionSharder",
    "CompressedEmbeddingBagConfig",
    "CompressedStorageReservation",
    "CompressionRule",
    "FullTable",
    "HashingTrick",
    "MemoryReport",
    "ReclusterConfig",
    "ReclusterReport",
    "ReclusterSchedule",
    "ResidualCCE",
    "ShardedCompressedEmbeddingBagCollection",
    "compress",
    "get_sharders",
    "parameter_constraints",
    "recluster",
]
