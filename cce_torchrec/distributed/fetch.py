"""Fetching assignments that are sharded by id: the one thing of a table that a rank does not have.

    ids of the batch -> all-to-all by block of ids -> their assignments -> all-to-all back -> rows, as if all were here

What travels is an id there and c small integers back; codebooks are replicated, so lookups and gradients are those of any
data-parallel table. Assignments are fetched in the forward pass (only ids are sent ahead), so they are never stale; ids are
sent again where blocks have moved meanwhile, because a table has grown.

Shapes: F features of tables whose assignments are fetched, W ranks, n ids, c assignments an id (the most of any table).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, bucketize_kjt_before_all2all
from torchrec.distributed.types import Awaitable, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.bounds import BoundsCheck
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.distributed.stamps import is_stale, stamp
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.encoding import smallest_int_dtype
from cce_torchrec.rewrite import RowRewriter, select_features


@dataclass(kw_only=True)
class FetchContext(EmbeddingShardingContext):
    """What a rank remembers of its batch while it asks for assignments.

    Attributes:
        features: the batch, which is looked up on this rank.
        ids: of each table whose assignments are fetched.
        places_n: where, in the order of the request, the answer for each id is.
        asked_W: how many ids each rank is asked for.
    """

    features: KeyedJaggedTensor
    ids: list[Tensor]
    places_n: Tensor
    asked_W: Tensor

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until ``stream`` is done with it."""
        for tensor in (self.features, *self.ids, self.places_n, self.asked_W):
            tensor.record_stream(stream)


class IdDist(nn.Module):
    """Sends ids to the ranks that hold their assignments: one bag a feature, so that one length a feature travels.

    Args:
        group: of the ranks.
        block_sizes_F: int64, of each feature, how many ids in a row a rank holds; on the device of the ids.
    """

    def __init__(self, group: dist.ProcessGroup, block_sizes_F: Tensor) -> None:
        super().__init__()
        self._dist = KJTAllToAll(group, [len(block_sizes_F)] * group.size())  # the name by which pipelines find it
        self.block_sizes_F = block_sizes_F

    def forward(
        self, keys: list[str], counts: list[int], ids_n: Tensor
    ) -> tuple[Awaitable[Awaitable[KeyedJaggedTensor]], Tensor, Tensor]:
        """Start sending.

        Args:
            keys: of the features.
            counts: how many ids each has.
            ids_n: feature by feature.

        Returns:
            The awaitable of what is asked of this rank; ``places_n`` and ``asked_W`` of :class:`FetchContext`.
        """
        lengths_F = torch.tensor(counts, dtype=torch.int64).to(ids_n.device, non_blocking=True)
        bags = KeyedJaggedTensor(keys=keys, values=ids_n, lengths=lengths_F, stride=1)
        ranks = self._dist._pg.size()
        request, places_n = bucketize_kjt_before_all2all(
            bags, ranks, self.block_sizes_F, output_permute=True, keep_original_indices=True
        )
        assert places_n is not None
        return self._dist(request), places_n, request.lengths().view(ranks, -1).sum(1)


class FetchGroup:
    """The group of data-parallel codebooks of which some have their assignments sharded by id.

    Args:
        rewriter: of all of the group's tables.
        env: ranks and process group.
        device: of this rank.
        mode: what to do with ids out of bounds; they are checked before they are sent.
    """

    goes_stale = True

    def __init__(self, rewriter: RowRewriter, env: ShardingEnv, device: torch.device, mode: BoundsCheckMode) -> None:
        self._rewrite, self._process_group = rewriter, env.process_group
        self._tables = [table for table in rewriter.tables if has_sharded_assignments(table.config)]
        self._maps = [_row_map(table) for table in self._tables]
        self._checks = [BoundsCheck(table.config, mode) for table in self._tables]
        self._width = max(row_map.assignments_per_id for row_map in self._maps)
        self._dtype = smallest_int_dtype(max(row_map.num_codes for row_map in self._maps))
        self._sizes = [len(table.config.feature_names) for table in self._tables]
        self._features = [feature for table in self._tables for feature in table.config.feature_names]
        self._world_size, self._device = env.world_size, device
        self.input_dist: nn.Module = IdDist(env.process_group, self._block_sizes())

    def _block_sizes(self) -> Tensor:
        tables = [table for table in self._tables for _ in table.config.feature_names]
        sizes = [-(-table.config.num_embeddings // self._world_size) for table in tables]
        return torch.tensor(sizes, dtype=torch.int64, device=self._device)

    def update_blocks(self) -> None:
        """Send ids where they are held by now, after a table has grown."""
        assert isinstance(self.input_dist, IdDist)
        self.input_dist.block_sizes_F = self._block_sizes()

    def distribute(
        self, features: KeyedJaggedTensor, version: int
    ) -> tuple[EmbeddingShardingContext, Awaitable[Awaitable[KeyedJaggedTensor]]]:
        local = select_features(features, self._rewrite.features)
        asked = select_features(local, self._features)
        counts = asked.length_per_key()
        per_table = [sum(part) for part in _cut(counts, self._sizes)]
        ids = [check(ids_n) for check, ids_n in zip(self._checks, asked.values().split(per_table), strict=True)]
        keys = [stamp(version) + feature for feature in self._features]
        awaitable, places_n, asked_W = self.input_dist(keys, counts, torch.cat(ids))
        context = FetchContext(
            batch_size_per_feature_pre_a2a=local.stride_per_key(),
            features=local,
            ids=ids,
            places_n=places_n,
            asked_W=asked_W,
        )
        return context, awaitable

    def is_stale(self, received: KeyedJaggedTensor, version: int) -> bool:
        return is_stale(received, version)

    def localize(self, received: KeyedJaggedTensor, context: EmbeddingShardingContext) -> KeyedJaggedTensor:
        assert isinstance(context, FetchContext)
        counts_FW = received.lengths().view(len(self._features), -1)
        answers_nc = self._exchange(self._answers(received, counts_FW), counts_FW.sum(0), context.asked_W)
        answers_nc = answers_nc.index_select(0, context.places_n)
        assigned = {
            table.name: (ids_n, rows_nc[:, : row_map.assignments_per_id])
            for table, row_map, ids_n, rows_nc in zip(
                self._tables, self._maps, context.ids, answers_nc.split([len(ids) for ids in context.ids]), strict=True
            )
        }
        return self._rewrite(context.features, assigned=assigned)

    def _answers(self, received: KeyedJaggedTensor, counts_FW: Tensor) -> Tensor:
        """The assignments of the ids that the ranks ask for, rank by rank: [n, c]."""
        ids_n = received.values()
        answers_nc = torch.zeros(len(ids_n), self._width, dtype=self._dtype, device=ids_n.device)
        per_table = [sum(part) for part in _cut(received.length_per_key(), self._sizes)]
        pieces = zip(self._maps, ids_n.split(per_table), answers_nc.split(per_table), strict=True)
        for row_map, table_ids_n, out_nc in pieces:
            out_nc[:, : row_map.assignments_per_id] = row_map.assigned(table_ids_n)
        by_feature = answers_nc.split(counts_FW.flatten().tolist())  # they came feature by feature, rank by rank
        ranks = counts_FW.shape[1]
        return torch.cat([part for rank in range(ranks) for part in by_feature[rank::ranks]])

    def _exchange(self, answers_nc: Tensor, given_W: Tensor, asked_W: Tensor) -> Tensor:
        """Send answers back: as bytes, since gloo has no int16."""
        row_bytes = self._width * self._dtype.itemsize
        given, asked = ((counts_W * row_bytes).tolist() for counts_W in (given_W, asked_W))
        out = torch.empty(sum(asked), dtype=torch.uint8, device=answers_nc.device)
        dist.all_to_all_single(out, answers_nc.view(torch.uint8).flatten(), asked, given, group=self._process_group)
        return out.view(self._dtype).view(-1, self._width)


def _cut(values: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _row_map(table: LoweredTable) -> CCERowMap:
    assert isinstance(table.row_map, CCERowMap)
    return table.row_map
