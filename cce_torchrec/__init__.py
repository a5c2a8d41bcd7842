"""Compressed embedding tables for TorchRec: CCE and its siblings as sharded embedding-bag collections."""

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import CompressedEmbeddingBagConfig
from cce_torchrec.distributed import (
    CompressedEmbeddingBagCollectionSharder,
    ShardedCompressedEmbeddingBagCollection,
    get_sharders,
)
from cce_torchrec.memory import MemoryReport
from cce_torchrec.methods import (
    CCE,
    CE,
    DHE,
    METHODS,
    PQ,
    QR,
    ROBE,
    Bloom,
    CCERobe,
    FullTable,
    HashedNet,
    HashEmbedding,
    HashingTrick,
    LowDim,
    ResidualCCE,
    TTRec,
    mixed_dimensions,
)
from cce_torchrec.planner import (
    BudgetPlan,
    CompressedPerfEstimator,
    CompressedStorageEstimator,
    CompressedStorageReservation,
    parameter_constraints,
    plan_compression,
)
from cce_torchrec.recluster import ReclusterConfig, ReclusterReport, ReclusterSchedule, recluster, record_gradients
from cce_torchrec.swap import CompressionRule, compress

__all__ = [
    "CCE",
    "CE",
    "DHE",
    "METHODS",
    "PQ",
    "QR",
    "ROBE",
    "Bloom",
    "BudgetPlan",
    "CCERobe",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingBagCollectionSharder",
    "CompressedEmbeddingBagConfig",
    "CompressedPerfEstimator",
    "CompressedStorageEstimator",
    "CompressedStorageReservation",
    "CompressionRule",
    "FullTable",
    "HashEmbedding",
    "HashedNet",
    "HashingTrick",
    "LowDim",
    "MemoryReport",
    "ReclusterConfig",
    "ReclusterReport",
    "ReclusterSchedule",
    "ResidualCCE",
    "ShardedCompressedEmbeddingBagCollection",
    "TTRec",
    "compress",
    "get_sharders",
    "mixed_dimensions",
    "parameter_constraints",
    "plan_compression",
    "recluster",
    "record_gradients",
]
