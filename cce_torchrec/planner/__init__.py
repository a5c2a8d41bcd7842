"""TorchRec's sharding planner for compressed collections, and planning compression for a budget."""

from cce_torchrec.planner.budget import plan_compression
from cce_torchrec.planner.constraints import parameter_constraints
from cce_torchrec.planner.perf import CompressedPerfEstimator
from cce_torchrec.planner.plan import BudgetPlan, PlannedTable
from cce_torchrec.planner.reservation import CompressedStorageReservation
from cce_torchrec.planner.stats import CompressedEmbeddingStats
from cce_torchrec.planner.storage import CompressedStorageEstimator

__all__ = [
    "BudgetPlan",
    "CompressedEmbeddingStats",
    "CompressedPerfEstimator",
    "CompressedStorageEstimator",
    "CompressedStorageReservation",
    "PlannedTable",
    "parameter_constraints",
    "plan_compression",
]
