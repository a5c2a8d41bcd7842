"""What a step of a compressed collection costs under each sharding type, for the planner to rank them by.

TorchRec's own estimate ranks row-wise first and data-parallel last; measured steps come in the opposite order
(docs/results/sharded_step.md), which is that of the bytes a rank sends. A rank of W sends, for a codebook of r rows and d
dims, one of the C columns of its table, n ids and R * n rows a bag, and a batch of B bags:

    data_parallel:                (W-1)/W * 2 * r * d * 4                                a gradient, in a ring
      assignments sharded by id:  ... + (W-1)/W * B * n * (8 / C + a)                    ids there, a bytes an id back
    table_wise, column_wise:      (W-1)/W * B * (2 * d * 4 + (n * 8 + 8) / C)            vectors, gradients, ids, lengths
    row_wise and its kin:         (W-1) * B * (2 * d * 4 + 4) + (W-1)/W * B * n * R * 4  partial sums, lengths, rows

Looking rows up reads and writes as much under each type. Assignments on their way back are waited for, with nothing else to
do, so that time counts twice. Ids go to every rank that has a part of a column: to more of them column-wise than table-wise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import Perf, ShardingOption
from torchrec.distributed.planner.utils import get_num_poolings
from torchrec.distributed.types import ShardingType

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.encoding import smallest_int_dtype

_BY_TABLE = (
    ShardingType.TABLE_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
)


class CompressedPerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's performance estimator, with codebooks of compressed collections ranked as they are measured.

    The communication of a shard is its part of the bytes that all ranks send for it, over the topology's bandwidth; its
    computation the bytes of the rows that it looks up, over the memory's. Same arguments as TorchRec's; give the planner
    :func:`parameter_constraints` too, from which it has the rows of an id.

    Example:
        >>> from torchrec.distributed.planner.types import Topology
        >>> estimator = CompressedPerfEstimator(Topology(world_size=2, compute_device="cpu"))
    """

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        """Set the perf of every shard."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            collection = option.module[1]
            if isinstance(collection, CompressedEmbeddingBagCollection):
                table = next(t for t in collection.lowered_tables if option.name in t.physical_names)
                self._correct(option, table)

    def _correct(self, option: ShardingOption, table: LoweredTable) -> None:
        topology = self._topology
        across_hosts = topology.world_size > topology.local_world_size
        bandwidth = topology.inter_host_bw if across_hosts else topology.intra_host_bw
        memory = topology.ddr_mem_bw if topology.compute_device == "cpu" else topology.hbm_mem_bw
        bags = option.batch_size * sum(get_num_poolings(self._constraints, option))
        lookups = option.batch_size * sum(
            length * poolings
            for length, poolings in zip(option.input_lengths, get_num_poolings(self._constraints, option), strict=True)
        )
        for shard in option.shards:
            width = shard.size[1]
            parts = sent(option.sharding_type, shard.size, table, topology.world_size, bags, lookups)
            bytes_ = sum(parts) + parts.assignments
            # Of all ranks' lookups, a shard of a column has all, one of rows or a replica its share.
            share = topology.world_size if option.sharding_type in _BY_TABLE else 1
            looked_up = share * lookups * width * 4 / memory
            shard.perf = Perf(
                fwd_compute=looked_up,
                fwd_comms=bytes_ / 2 / bandwidth,
                bwd_compute=2 * looked_up,
                bwd_comms=bytes_ / 2 / bandwidth,
            )


class Sent(NamedTuple):
    """Bytes that all ranks together send in a step.

    Attributes:
        ids: ids, rows and lengths there.
        assignments: back.
        vectors: pooled vectors, and their gradients.
        gradients: of replicated codebooks, all-reduced.
    """

    ids: float
    assignments: float
    vectors: float
    gradients: float


def sent(
    sharding_type: str, size: Sequence[int], table: LoweredTable, world_size: int, bags: float, lookups: float
) -> Sent:
    """What all ranks send in a step for one shard.

    Args:
        sharding_type: TorchRec's name of it.
        size: rows and dims of the shard.
        table: whose codebook it is a part of.
        world_size: W.
        bags: B, of one rank, over all features of the table.
        lookups: rows that these take of the codebook, of one rank.
    """
    rows, dim = size
    columns, ids, others = len(table.row_map.columns), lookups / table.row_map.rows_per_id, world_size - 1
    if sharding_type == ShardingType.DATA_PARALLEL.value:  # a shard is one rank's replica
        part = others / world_size
        there, back = _fetched(table, ids)
        return Sent(part * there, part * back, 0.0, part * 2 * rows * dim * 4)
    if sharding_type in _BY_TABLE:
        return Sent(others * (ids * 8 + bags * 8) / columns, 0.0, others * 2 * bags * dim * 4, 0.0)
    # Rows travel as int32 where they fit, and lengths with them.
    itemsize = 4 if table.row_map.columns[0].num_rows < 2**31 else 8
    of_rows = others * bags * itemsize + others / world_size * lookups * itemsize
    return Sent(of_rows, 0.0, others * bags * 2 * dim * 4, 0.0)


def _fetched(table: LoweredTable, ids: float) -> tuple[float, float]:
    """Bytes of ids and of their assignments in one column, where those are sharded by id."""
    row_map = table.row_map
    if not has_sharded_assignments(table.config):
        return 0.0, 0.0
    assert isinstance(row_map, CCERowMap)
    itemsize = smallest_int_dtype(row_map.num_codes).itemsize
    return ids * 8 / len(row_map.columns), ids * itemsize * row_map.num_assigned
