"""What a collection stores, table by table, and the compression counted both ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype

from cce_torchrec.config import CompressedEmbeddingBagConfig, method_of
from cce_torchrec.lowering import DecodedTable, Table, decoded_tables, lower_tables
from cce_torchrec.methods import MethodConfig


@dataclass(frozen=True, kw_only=True)
class TableMemory:
    """Sizes of one logical table (over all ranks, replicas counted once).

    Attributes:
        table: its name.
        method: key of its method.
        num_params: trainable parameters.
        full_params: parameters of the full table.
        codebook_bytes: bytes of the trainable parameters: codebooks, decoders and projections.
        assignment_bytes: bytes of everything else that is stored: assignments and hash coefficients.
        optimizer_bytes: bytes of the optimizer state we can see: that of fused optimizers and of a given optimizer.
        full_bytes: bytes of the full table's weight.
    """

    table: str
    method: str
    num_params: int
    full_params: int
    codebook_bytes: int
    assignment_bytes: int
    optimizer_bytes: int
    full_bytes: int

    @property
    def parameter_ratio(self) -> float:
        """How many times fewer trainable parameters than the full table."""
        return self.full_params / self.num_params

    @property
    def bytes_ratio(self) -> float:
        """How many times fewer bytes than the full table's weight, assignments counted."""
        return self.full_bytes / (self.codebook_bytes + self.assignment_bytes)


_HEADER = (
    f"{'table':<24}{'method':<16}{'params':>14}{'codebooks B':>14}{'assignm. B':>14}{'optim. B':>14}{'full B':>16}"
    f"{'x params':>10}{'x bytes':>10}"
)


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The sizes of all tables of a collection; prints as a table.

    Attributes:
        tables: one entry a logical table, in config order.
    """

    tables: tuple[TableMemory, ...]

    @property
    def total(self) -> TableMemory:
        """The sums over all tables."""
        names = ("num_params", "full_params", "codebook_bytes", "assignment_bytes", "optimizer_bytes", "full_bytes")
        sums = {name: sum(getattr(table, name) for table in self.tables) for name in names}
        return TableMemory(table="total", method="", **sums)

    @property
    def parameter_ratio(self) -> float:
        """Compression counted in trainable parameters."""
        return self.total.parameter_ratio

    @property
    def bytes_ratio(self) -> float:
        """Compression counted in stored bytes, assignments included."""
        return self.total.bytes_ratio

    def __str__(self) -> str:
        rows = [
            f"{row.table:<24}{row.method:<16}{row.num_params:>14,}{row.codebook_bytes:>14,}{row.assignment_bytes:>14,}"
            f"{row.optimizer_bytes:>14,}{row.full_bytes:>16,}{row.parameter_ratio:>10.1f}{row.bytes_ratio:>10.1f}"
            for row in (*self.tables, self.total)
        ]
        return "\n".join([_HEADER, *rows])


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors in an optimizer's state of one parameter, over all ranks."""
    total = 0
    for value in state.values():
        if isinstance(value, ShardedTensor):
            total += value.metadata().size.numel() * value.metadata().tensor_properties.dtype.itemsize
        elif isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total


def optimizer_state_bytes(optimizer: Optimizer | None, parameter: nn.Parameter) -> int:
    """Bytes that ``optimizer``, or one that is applied in backward, keeps for ``parameter``."""
    states = [optimizer.state.get(parameter, {})] if optimizer is not None else []
    for in_backward in getattr(parameter, "_in_backward_optimizers", []):
        states.extend(in_backward.state.values())
    return sum(map(state_bytes, states))


def memory_report(
    configs: Sequence[EmbeddingBagConfig],
    tables: Sequence[Table],
    optimizer_bytes: Mapping[str, int],
    optimizer: Optimizer | None,
) -> MemoryReport:
    """Add up the sizes of ``tables``.

    Args:
        configs: logical tables, in the order of the report.
        tables: what they became, in any order.
        optimizer_bytes: bytes of optimizer state by physical table; tables that are missing count 0.
        optimizer: what trains decoders and projections.
    """
    by_name = {table.name: table for table in tables}
    report = []
    for config in configs:
        table, method = by_name[config.name], method_of(config)
        physical_names = [] if isinstance(table, DecodedTable) else table.physical_names
        dense = [] if table.dense_part is None else list(table.dense_part.parameters())
        dense_bytes = sum(parameter.numel() * parameter.element_size() for parameter in dense)
        num_params = method.num_params(config.num_embeddings, config.embedding_dim)
        full_params = config.num_embeddings * config.embedding_dim
        itemsize = data_type_to_dtype(config.data_type).itemsize
        report.append(
            TableMemory(
                table=config.name,
                method=method.key,
                num_params=num_params,
                full_params=full_params,
                codebook_bytes=(num_params - sum(p.numel() for p in dense)) * itemsize + dense_bytes,
                assignment_bytes=table.stored_bytes(),
                optimizer_bytes=sum(optimizer_bytes.get(name, 0) for name in physical_names)
                + sum(optimizer_state_bytes(optimizer, parameter) for parameter in dense),
                full_bytes=full_params * itemsize,
            )
        )
    return MemoryReport(tables=tuple(report))


def stored_bytes(method: MethodConfig, num_embeddings: int, embedding_dim: int) -> int:
    """Bytes of the float32 parameters and of all else that a table of a method stores; nothing is allocated."""
    config = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=embedding_dim, feature_names=["f"], method=method
    )
    meta = torch.device("meta")
    tables: list[Table] = [*lower_tables([config], [meta]), *decoded_tables([config], meta)]
    total = memory_report([config], tables, {}, None).total
    return total.codebook_bytes + total.assignment_bytes
