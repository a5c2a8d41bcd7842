"""Compressed tables in TorchRec's sharding planner."""

from cce_torchrec.planner.constraints import parameter_constraints
from cce_torchrec.planner.reservation import CompressedStorageReservation

__all__ = ["CompressedStorageReservation", "parameter_constraints"]
