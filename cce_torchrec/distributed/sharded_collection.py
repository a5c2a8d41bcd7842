"""The compressed collection across ranks: TorchRec's sharded collection of codebooks, with ids rewritten on the way.

    KJT of ids -> groups distribute (all-to-all) -> groups localize (rows) -> sharded EBC lookup -> its output dist -> Relabel

It holds a ``ShardedEmbeddingBagCollection`` rather than being one, so that every sharding type, kernel and optimizer of
TorchRec stays TorchRec's own code.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import FusedKJTListSplitsAwaitable, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.collection import CompressedEmbeddingBagCollection, refuse_other_layouts
from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.decoding import BagDecoder, join
from cce_torchrec.distributed.build import shard_codebooks, take_over_state
from cce_torchrec.distributed.dense_parts import replicate
from cce_torchrec.distributed.fetch import FetchGroup
from cce_torchrec.distributed.groups import OwnerGroup, make_group
from cce_torchrec.distributed.growth import grow_on_all_ranks
from cce_torchrec.distributed.id_sharding import keep_local_blocks
from cce_torchrec.growth import refuse_while_reclustering
from cce_torchrec.id_counts import IdCounts
from cce_torchrec.id_gradients import IdGradients
from cce_torchrec.lowering import DecodedTable, LoweredTable, Table, decoded_tables, lower_tables
from cce_torchrec.memory import MemoryReport, memory_report, optimizer_state_bytes, state_bytes
from cce_torchrec.rewrite import Relabel

if TYPE_CHECKING:
    from cce_torchrec.recluster.background import BackgroundReclustering


@dataclass
class CompressedContext(EmbeddingBagCollectionContext):
    """What a batch carries from its input dist to its output dist.

    Attributes:
        version: that of the assignments its rows were computed from.
        factors_BF: what its pooled vectors are multiplied by (MEAN pooling, scales).
        batch: the raw batch: for decode tables, counts, the recording of gradients, and rows that became stale.
        localized: whether its rows stand where its ids stood (after a prefetch).
    """

    version: int = -1
    factors_BF: Tensor | None = None
    batch: KeyedJaggedTensor | None = None
    localized: bool = False

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until ``stream`` is done with it."""
        super().record_stream(stream)
        for tensor in (self.factors_BF, self.batch):
            if tensor is not None:
                tensor.record_stream(stream)


class ShardedCompressedEmbeddingBagCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], KeyedTensor, CompressedContext]
):
    """A :class:`CompressedEmbeddingBagCollection` sharded by a TorchRec plan; made by its sharder.

    Args:
        module: the unsharded collection, on any device; weights survive unless it is on "meta".
        params: the plan, by physical table.
        ebc_sharder: shards the inner collection.
        env: ranks and process group.
        device: of this rank.
        bounds_check_mode: what an id out of bounds does; the module's own where ``None``.
        module_fqn: the module's name in the model.
    """

    def __init__(
        self,
        module: CompressedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        bounds_check_mode: BoundsCheckMode | None = None,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=ebc_sharder.qcomm_codecs_registry)
        self._env, self._device = env, device
        self._configs = [copy.copy(config) for config in module.embedding_bag_configs()]
        self._is_weighted = module.is_weighted()
        self.lowered_tables: list[LoweredTable] = lower_tables(
            self._configs, [torch.device("meta") if has_sharded_assignments(c) else device for c in self._configs]
        )
        keep_local_blocks(self.lowered_tables, env, device)
        self._row_maps = nn.ModuleDict({table.name: table.row_map for table in self.lowered_tables})
        self.decoded_tables: list[DecodedTable] = decoded_tables(self._configs, device)
        self._decoders = replicate(module, [*self.lowered_tables, *self.decoded_tables], env)
        self._embedding_bag_collection = shard_codebooks(
            module, self.lowered_tables, params, ebc_sharder, env, device, module_fqn
        )
        mode = module.bounds_check_mode if bounds_check_mode is None else bounds_check_mode
        inner = self._embedding_bag_collection
        self._groups = [
            make_group(sharding_type, sharding, self.lowered_tables, env, device, self._is_weighted, mode)
            for sharding_type, sharding in zip(inner._sharding_types, inner._embedding_shardings, strict=True)
        ]
        for group, lookup in zip(self._groups, inner._lookups, strict=True):
            if isinstance(group, OwnerGroup):
                group.fuse(lookup, self._is_weighted)
        take_over_state(module, inner, self._row_maps, self.lowered_tables, env)
        # Pipelines look for these: they fuse the all-to-alls of all input dists and copy lookups to their streams.
        self._input_dists = [group.input_dist for group in self._groups]
        self._lookups, self._output_dists = inner._lookups, inner._output_dists
        inner._has_uninitialized_input_dist = False  # its input_dist is never called: the groups' are
        self._relabel = Relabel(self.lowered_tables)
        self._decode = BagDecoder(self.decoded_tables, self._is_weighted, mode)
        self._goes_stale = any(group.goes_stale for group in self._groups)
        self._version = 0
        self.id_counts = IdCounts(self.tables())
        self.id_gradients: IdGradients | None = None
        self.reclustering: BackgroundReclustering | None = None
        self.register_load_state_dict_pre_hook(refuse_other_layouts)
        self.register_load_state_dict_post_hook(lambda *_: self.assignments_changed())

    def create_context(self) -> CompressedContext:
        """A fresh context for one batch."""
        return CompressedContext()

    def input_dist(self, ctx: CompressedContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Start sending the batch where it is looked up: as ids to owners, as rows to row-wise codebooks."""
        with torch.no_grad():
            ctx.version = self._version
            ctx.factors_BF = self._relabel.factors(features)
            ctx.batch = features
            awaitables = []
            for group in self._groups:
                context, received = group.distribute(features, self._version)
                awaitables.append(received)
                ctx.sharding_contexts.append(context)
            return KJTListSplitsAwaitable(awaitables, ctx)

    def _localize(self, ctx: CompressedContext, received: KJTList) -> KJTList:
        """Rows to look up on this rank; those computed before a re-clustering are computed again."""
        if ctx.localized:
            return received
        # A pipeline that was detached and attached again gives a batch a new context but keeps what was received.
        stale = (group.is_stale(kjt, self._version) for group, kjt in zip(self._groups, received, strict=True))
        features = ctx.batch if self._goes_stale else None
        if features is not None and (ctx.version != self._version or any(stale)):
            ctx.sharding_contexts.clear()
            # Pipelines replace the all-to-all by one that returns its splits, which only this awaitable can wait for.
            request = self.input_dist(ctx, features)
            received = FusedKJTListSplitsAwaitable([request], [ctx], self._env.process_group).wait()[0].wait()
        groups = zip(self._groups, received, ctx.sharding_contexts, strict=True)
        return KJTList([group.localize(kjt, context) for group, kjt, context in groups])

    def compute(self, ctx: CompressedContext, dist_input: KJTList) -> list[Tensor]:
        """Look up what this rank received."""
        return self._embedding_bag_collection.compute(ctx, self._localize(ctx, dist_input))

    def output_dist(self, ctx: CompressedContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Send pooled vectors back and name them."""
        return self._named(ctx, self._embedding_bag_collection.output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: CompressedContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Look up, send back and name; lookups of one sharding type overlap with the collectives of another."""
        rows = self._localize(ctx, input)
        return self._named(ctx, self._embedding_bag_collection.compute_and_output_dist(ctx, rows))

    def _named(self, ctx: CompressedContext, pooled: LazyAwaitable[KeyedTensor]) -> LazyAwaitable[KeyedTensor]:
        batch, factors_BF = ctx.batch, ctx.factors_BF
        decoded = self._decode(batch) if batch is not None else {}
        if batch is not None and self.training and torch.is_grad_enabled():
            self.id_counts.observe(batch)

        def name(values: KeyedTensor) -> KeyedTensor:
            rows = self._relabel(values, factors_BF)
            vectors = join(rows, decoded, [*rows.keys(), *decoded]) if decoded else rows
            if self.id_gradients is not None and batch is not None:
                self.id_gradients.observe(batch, vectors)
            return vectors

        pooled.callbacks.append(name)
        return pooled

    def prefetch(
        self, dist_input: KJTList, forward_stream: torch.Stream | None = None, ctx: CompressedContext | None = None
    ) -> None:
        """Bring the rows of a batch into the caches of the inner collection's kernels."""
        assert ctx is not None
        for index, kjt in enumerate(self._localize(ctx, dist_input)):
            dist_input[index] = kjt
        ctx.localized = True
        self._embedding_bag_collection.prefetch(dist_input, forward_stream, ctx)

    def assignments_changed(self) -> None:
        """Rows computed before now are stale: called after a re-clustering and after loading a checkpoint."""
        self._version += 1

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The *logical* configs."""
        return self._configs

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that share this collection."""
        return self._env.process_group

    def is_weighted(self) -> bool:
        """Whether KJTs must carry weights."""
        return self._is_weighted

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes stored for each table over all ranks, replicas once, and the compression counted both ways.

        A rank knows the fused optimizer state of the tables that it holds a part of.

        Args:
            optimizer: the one that trains what no fused kernel trains, so that its state is counted too.
        """
        inner = self._embedding_bag_collection
        fused = inner.fused_optimizer.state_dict()["state"]
        optimizer_bytes = {
            config.name: state_bytes(fused.get(f"embedding_bags.{config.name}.weight", {}))
            or optimizer_state_bytes(optimizer, inner.embedding_bags[config.name].weight)
            for config in inner._embedding_bag_configs
        }
        return memory_report(self._configs, self.tables(), optimizer_bytes, optimizer)

    @torch.no_grad()
    def grow(self, table: str, num_embeddings: int) -> None:
        """As of an unsharded collection; collective: every rank calls it after the same step, with the same arguments.

        Raises:
            ValueError: on every rank, with nothing changed, as of an unsharded collection; and where ranks differ in what
                they ask for.
        """
        refuse_while_reclustering(self)
        grow_on_all_ranks(self.tables(), table, num_embeddings, self._env)
        for group in self._groups:
            if isinstance(group, FetchGroup):
                group.update_blocks()
                self.assignments_changed()  # ids that are on their way went to the ranks that had them

    def tables(self) -> list[Table]:
        """Those of row methods, then those of decode methods."""
        return [*self.lowered_tables, *self.decoded_tables]

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """What this module keeps in step, so that DDP must leave it alone: all but dense parameters; buffers too."""
        for name, _ in self.named_parameters():
            if not name.startswith("_decoders."):
                yield append_prefix(prefix, name)
        for name, _ in self.named_buffers():
            yield append_prefix(prefix, name)

    @property
    def unsharded_module_type(self) -> type[CompressedEmbeddingBagCollection]:
        """What this is a sharded version of."""
        return CompressedEmbeddingBagCollection
