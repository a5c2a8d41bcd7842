"""What a table takes of the memory of each device: everything, not only its codebooks."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, data_type_to_dtype

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.methods import RowMethod
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster import ReclusterConfig
from cce_torchrec.recluster.workspace import recluster_workspace

Placement = Literal["replicated", "row_wise", "table_wise"]
OptimizerName = Literal["sgd", "rowwise_adagrad", "adagrad", "adam"]
_STATES = {"sgd": 0, "adagrad": 1, "adam": 2}  # float32 numbers a parameter


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one table on each device.

    Attributes:
        codebooks: its trainable parameters.
        gradients: of replicated codebooks, which are all-reduced whole; fused kernels keep none.
        optimizer: the optimizer's state, a step count aside.
        assignments: everything else that is stored.
        workspace: what a re-clustering holds until all tables are done.
        transient: what its turn in a re-clustering takes besides; only one table has its turn at a time.
    """

    codebooks: int
    gradients: int
    optimizer: int
    assignments: int
    workspace: int = 0
    transient: int = 0

    @property
    def held(self) -> int:
        """All but what is transient."""
        return self.codebooks + self.gradients + self.optimizer + self.assignments + self.workspace


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where tables are to live.

    Attributes:
        world_size: how many devices.
        optimizer: what trains the tables.
        recluster: how they are re-clustered.
        device_type: "cpu" or "cuda".
    """

    world_size: int
    optimizer: OptimizerName
    recluster: ReclusterConfig
    device_type: str


def footprint(table: EmbeddingBagConfig, method: RowMethod, placement: Placement, devices: Devices) -> Footprint:
    """The bytes of one table on the device that has most of it; nothing is allocated.

    Args:
        table: its sizes; ``assignment_placement`` counts, its own method does not.
        method: that it shall have.
        placement: "replicated" is whole on each device, "row_wise" ceil(rows / devices) of them, "table_wise" whole on one.
        devices: where.
    """
    size = (table.num_embeddings, table.embedding_dim, table.data_type, has_sharded_assignments(table))
    return _footprint(*size, method, placement, devices)


@functools.lru_cache(maxsize=1 << 16)  # tables of one size are alike, and there may be a thousand of them
def _footprint(
    num_embeddings: int,
    embedding_dim: int,
    data_type: DataType,
    is_sharded: bool,
    method: RowMethod,
    placement: Placement,
    devices: Devices,
) -> Footprint:
    row_map = method.row_map("t", num_embeddings, embedding_dim, torch.device("meta"))
    parts = devices.world_size if placement == "row_wise" else 1
    sizes = [(-(-column.num_rows // parts), column.dim) for column in row_map.columns]
    num_params = sum(rows * dim for rows, dim in sizes)
    state = optimizer_bytes(devices.optimizer, sum(rows for rows, _ in sizes), num_params)
    codebooks = num_params * data_type_to_dtype(data_type).itemsize
    assignments, workspace, transient = row_map.stored_bytes(), 0, 0
    if isinstance(row_map, CCERowMap):
        rows = sum(column.num_rows for column in row_map.columns)
        whole_state = optimizer_bytes(devices.optimizer, rows, rows * row_map.columns[0].dim)
        workspace, transient = recluster_workspace(
            row_map, devices.recluster, devices.world_size, devices.device_type, is_sharded, whole_state
        )
        if is_sharded:
            elsewhere = row_map.num_embeddings - -(-row_map.num_embeddings // devices.world_size)
            assignments -= elsewhere * row_map.encoding.width * row_map.encoding.dtype.itemsize
    return Footprint(
        codebooks=codebooks,
        gradients=codebooks if placement == "replicated" else 0,
        optimizer=state,
        assignments=assignments,
        workspace=workspace,
        transient=_rounded_up(transient),
    )


def optimizer_bytes(optimizer: OptimizerName, num_rows: int, num_params: int) -> int:
    """The state of an optimizer, in float32: one number a row, or some a parameter."""
    return 4 * (num_rows if optimizer == "rowwise_adagrad" else _STATES[optimizer] * num_params)


def _rounded_up(transient: int) -> int:
    """To one of eight values in each doubling, so that there are few different ones to choose the maximum from."""
    step = 1 << max(0, transient.bit_length() - 4)
    return -(-transient // step) * step
