"""Re-clustering: K-means over the vectors that the sketch holds, locally or across ranks."""

from cce_torchrec.recluster.background import BackgroundReclustering, recluster_in_background
from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport, TableReport
from cce_torchrec.recluster.gradients import record_gradients
from cce_torchrec.recluster.schedule import ReclusterSchedule
from cce_torchrec.recluster.step import recluster

__all__ = [
    "BackgroundReclustering",
    "ReclusterConfig",
    "ReclusterReport",
    "ReclusterSchedule",
    "TableReport",
    "recluster",
    "recluster_in_background",
    "record_gradients",
]
