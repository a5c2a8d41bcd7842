"""Re-clustering: K-means over the vectors that the sketch holds, locally or across ranks."""

from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport, TableReport
from cce_torchrec.recluster.gradients import record_gradients
from cce_torchrec.recluster.schedule import ReclusterSchedule
from cce_torchrec.recluster.step import recluster

__all__ = [
    "ReclusterConfig",
    "ReclusterReport",
    "ReclusterSchedule",
    "TableReport",
    "recluster",
    "record_gradients",
]
