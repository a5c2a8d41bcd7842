"""Memory that the planner does not see in a plan: assignments, and dense parameters, beside the codebooks."""

import copy

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, StorageReservation, Topology
from torchrec.distributed.types import ModuleSharder

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments

# What TorchRec's own reservation counts dense parameters times: themselves 1, optimizer state 2, gradients in DDP 3.
DENSE_MULTIPLIER = 6


def dense_bytes_per_rank(module: nn.Module) -> int:
    """Bytes of the parameters of decoders and projections on each rank, with gradients and optimizer state."""
    return DENSE_MULTIPLIER * sum(
        parameter.numel() * parameter.element_size()
        for collection in module.modules()
        if isinstance(collection, CompressedEmbeddingBagCollection)
        for parameter in collection._decoders.parameters()
    )


def assignment_bytes_per_rank(module: nn.Module, world_size: int) -> int:
    """Bytes of all that is stored beside parameters on each rank: whole where replicated, a block where sharded by id."""
    total = 0
    for collection in module.modules():
        if isinstance(collection, CompressedEmbeddingBagCollection):
            for table in collection.tables():
                stored = table.stored_bytes()
                total += -(-stored // world_size) if has_sharded_assignments(table.config) else stored
    return total


class CompressedStorageReservation(StorageReservation):
    """Reserves, on every device, what ``base`` reserves, and the assignments and dense parameters of compressed collections.

    A ``base`` that counts dense layers leaves out whatever is inside a collection, so nothing is counted twice. Dense
    parameters (those of decoders and projections) count six times, as TorchRec's ``HeuristicalStorageReservation`` counts.

    Args:
        base: what is reserved for the rest of the model; 15% of each GPU's HBM where ``None``, as TorchRec does by
            default.

    Raises:
        ValueError: in :meth:`reserve`, where they alone do not fit a device.

    Example:
        >>> from torchrec.distributed.planner import EmbeddingShardingPlanner
        >>> reservation = CompressedStorageReservation(FixedPercentageStorageReservation(percentage=0.15))
    """

    def __init__(self, base: StorageReservation | None = None) -> None:
        self._base = base or FixedPercentageStorageReservation(percentage=0.15)
        self._last: Topology | None = None

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """The topology with what is left for codebooks and their optimizer state."""
        reserved = self._base.reserve(topology, batch_size, module, sharders, constraints)
        assignments, dense = assignment_bytes_per_rank(module, topology.world_size), dense_bytes_per_rank(module)
        for device in reserved.devices:
            memory = "hbm" if topology.compute_device == "cuda" else "ddr"
            free = getattr(device.storage, memory)
            left = free - assignments - dense
            if left < 0:
                raise ValueError(
                    f"Rank {device.rank}: the assignments of compressed tables take {assignments:,} bytes and their dense "
                    f"parameters, with gradients and optimizer state, {dense:,}: more than the {free:,} bytes of "
                    f"{memory.upper()} that are free. Shard assignments by id (assignment_placement='sharded'), or compress "
                    "fewer tables."
                )
            setattr(device.storage, memory, left)
        self._last = reserved
        return reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        """A copy of what :meth:`reserve` returned last."""
        return copy.deepcopy(self._last)
