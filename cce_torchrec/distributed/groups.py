"""Where ids become rows: one group a sharding type of the inner collection, on the client or on the owner.

* ``client``: every rank rewrites its own batch, and rows travel (row-wise codebooks: only the row tells the owner).
* ``owner``: ids travel, once a table and owner instead of c * R rows each, and the owner of the codebook rewrites them; the
  owner of a replicated codebook is every rank, for its own batch.
* ``fetch``: as the owner of replicated codebooks, but assignments that are sharded by id are fetched first (fetch.py).

All have the same two steps: :meth:`distribute` before the all-to-all, :meth:`localize` after it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingContext
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.tw_sharding import TwSparseFeaturesDist
from torchrec.distributed.types import Awaitable, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.fetch import FetchGroup
from cce_torchrec.distributed.stamps import is_stale, stamp
from cce_torchrec.fused import take_ids
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.native.bucketize import bucketize
from cce_torchrec.rewrite import RowRewriter, select_features

CLIENT_SIDE = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


def _context(sent: KeyedJaggedTensor) -> EmbeddingShardingContext:
    return EmbeddingShardingContext(
        batch_size_per_feature_pre_a2a=sent.stride_per_key(),
        variable_batch_per_feature=sent.variable_stride_per_key(),
    )


class Group(Protocol):
    """The path of a batch to the lookup of one sharding type.

    Attributes:
        input_dist: sends it.
        goes_stale: whether what is sent depends on the version of the assignments, or of the blocks of ids.
    """

    input_dist: nn.Module
    goes_stale: bool

    def distribute(
        self, features: KeyedJaggedTensor, version: int
    ) -> tuple[EmbeddingShardingContext, Awaitable[Awaitable[KeyedJaggedTensor]]]:
        """What there is to remember of the batch, and the awaitable of what this rank will receive.

        Args:
            features: this rank's batch of ids.
            version: that of the assignments and blocks, which what depends on them carries along.
        """

    def is_stale(self, received: KeyedJaggedTensor, version: int) -> bool:
        """Whether what was received depends on another version."""

    def localize(self, received: KeyedJaggedTensor, context: EmbeddingShardingContext) -> KeyedJaggedTensor:
        """What this rank looks up, given what :meth:`distribute` remembered."""


class ClientGroup:
    """Rewrite, then send rows, in half the bytes where tables are small enough: c * R of them an id travel, and lengths."""

    goes_stale = True

    def __init__(self, sharding: EmbeddingSharding, rewriter: RowRewriter) -> None:
        self.input_dist = sharding.create_input_dist()
        self._rewrite = rewriter
        most = max((column.num_rows for table in rewriter.tables for column in table.row_map.columns), default=0)
        self._is_narrow = most <= torch.iinfo(torch.int32).max

    def distribute(
        self, features: KeyedJaggedTensor, version: int
    ) -> tuple[EmbeddingShardingContext, Awaitable[Awaitable[KeyedJaggedTensor]]]:
        rows = self._rewrite(features, key_prefix=stamp(version))
        if not self._is_narrow:
            return _context(rows), self.input_dist(rows)
        if isinstance(self.input_dist, RwSparseFeaturesDist):
            blocks_F, send = self.input_dist._feature_block_sizes_tensor, self.input_dist._dist
            sorted_by_rank = bucketize(rows, blocks_F, send._pg.size())
            if sorted_by_rank is not None:
                return _context(rows), send(sorted_by_rank)
        narrow = KeyedJaggedTensor(
            keys=rows.keys(),
            values=rows.values().to(torch.int32),
            lengths=rows.lengths().to(torch.int32),
            weights=rows.weights_or_none(),
            stride=rows.stride(),
        )
        return _context(rows), self.input_dist(narrow)

    def is_stale(self, received: KeyedJaggedTensor, version: int) -> bool:
        return is_stale(received, version)

    def localize(self, received: KeyedJaggedTensor, context: EmbeddingShardingContext) -> KeyedJaggedTensor:
        return received


class OwnerGroup:
    """Send ids, then rewrite what belongs to the codebooks of this rank, where its lookup does not take ids itself."""

    goes_stale = False

    def __init__(self, input_dist: nn.Module, features: list[str], rewriter: RowRewriter) -> None:
        self.input_dist = input_dist
        self._features = features
        self._rewrite = rewriter
        self._sends_ids_on = False

    def fuse(self, lookup: nn.Module, is_weighted: bool) -> None:
        """Let the lookup take ids, where it can."""
        self._sends_ids_on = take_ids(lookup, self._rewrite, is_weighted)

    def distribute(
        self, features: KeyedJaggedTensor, version: int
    ) -> tuple[EmbeddingShardingContext, Awaitable[Awaitable[KeyedJaggedTensor]]]:
        ids = select_features(features, self._features)
        return _context(ids), self.input_dist(ids)

    def is_stale(self, received: KeyedJaggedTensor, version: int) -> bool:
        return False

    def localize(self, received: KeyedJaggedTensor, context: EmbeddingShardingContext) -> KeyedJaggedTensor:
        return received if self._sends_ids_on else self._rewrite(received)


def _tables_of_features(tables: Sequence[LoweredTable], features: list[str]) -> list[str]:
    """The physical tables behind a list of physical features, as it comes from TorchRec: all of a table's in a row."""
    config_of = {f: config for table in tables for config in table.physical_configs for f in config.feature_names}
    names, position = [], 0
    while position < len(features):
        config = config_of[features[position]]
        names.append(config.name)
        position += len(config.feature_names)
    return names


def make_group(
    sharding_type: str,
    sharding: EmbeddingSharding,
    tables: Sequence[LoweredTable],
    env: ShardingEnv,
    device: torch.device,
    is_weighted: bool,
    mode: BoundsCheckMode,
) -> Group:
    """Choose the side on which the rows of one sharding type are computed."""

    def rewriter(physical_features: list[str]) -> RowRewriter:
        return RowRewriter(tables, _tables_of_features(tables, physical_features), is_weighted, mode)

    if sharding_type in CLIENT_SIDE:
        return ClientGroup(sharding, rewriter(sharding.feature_names()))
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        local = rewriter(sharding.feature_names())
        if any(has_sharded_assignments(table.config) for table in local.tables):
            return FetchGroup(local, env, device, mode)
        return OwnerGroup(sharding.create_input_dist(), local.features, local)
    per_rank = [rewriter(names) for names in sharding.feature_names_per_rank()]
    input_dist = TwSparseFeaturesDist(env.process_group, [len(rank.features) for rank in per_rank])
    return OwnerGroup(input_dist, [name for rank in per_rank for name in rank.features], per_rank[env.rank])
