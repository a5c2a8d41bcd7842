"""The compressed collection: an ``EmbeddingBagCollection`` whose tables are small and whose ids are rewritten to rows.

KJT of ids -> RowRewriter -> KJT of rows -> inner EmbeddingBagCollection -> Relabel -> [B, D] a feature

Tables of decode methods take another way: KJT of ids -> BagDecoder -> [B, D] a feature.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.config import check_tables
from cce_torchrec.decoding import BagDecoder, join
from cce_torchrec.dense_parts import DenseParts
from cce_torchrec.fused import FusedCollection
from cce_torchrec.growth import check_growth, grow_table, refuse_while_reclustering
from cce_torchrec.id_counts import IdCounts
from cce_torchrec.id_gradients import IdGradients
from cce_torchrec.in_backward import apply_requests, requests_of
from cce_torchrec.lowering import DecodedTable, LoweredTable, Table, check_layouts, decoded_tables, lower_tables
from cce_torchrec.memory import MemoryReport, memory_report, optimizer_state_bytes
from cce_torchrec.methods.base import id_chunks
from cce_torchrec.rewrite import Relabel, RowRewriter, looks_up_weights

if TYPE_CHECKING:
    from cce_torchrec.recluster.background import BackgroundReclustering


class CompressedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """TorchRec's ``EmbeddingBagCollection`` with a compression method a table; same inputs, outputs and configs.

    For every feature f of a table with method m, pooled over the bag: out_f = pool( { vector_m(id) : id in bag } ).

    Args:
        tables: logical tables; :class:`CompressedEmbeddingBagConfig` and plain ``EmbeddingBagConfig`` side by side.
        device: where parameters and assignments live; "meta" builds neither.
        is_weighted: whether the KJTs carry a weight an id.
        bounds_check_mode: what an id outside [0, num_embeddings) does where a method stores something by id: FATAL raises
            an ``IndexError``, WARNING and IGNORE look up id 0.

    Raises:
        ValueError: duplicate names, a dim that the columns do not divide, something that is not a method.

    Example:
        >>> from torchrec import KeyedJaggedTensor
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> collection = CompressedEmbeddingBagCollection(tables=[table])
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([7, 42, 99]), torch.tensor([1, 0, 2]))
        >>> collection(ids)["f"].shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.FATAL,
    ) -> None:
        super().__init__()
        check_tables(tables)
        device = None if device is None else torch.device(device)
        self._configs = [copy.copy(table) for table in tables]  # a table that grows changes its own
        self.bounds_check_mode = bounds_check_mode
        self.lowered_tables: list[LoweredTable] = lower_tables(self._configs, [device] * len(tables))
        self.decoded_tables: list[DecodedTable] = decoded_tables(self._configs, device)
        self._row_maps = nn.ModuleDict({table.name: table.row_map for table in self.lowered_tables})
        self._decoders = DenseParts(self.tables())
        physical = [config for table in self.lowered_tables for config in table.physical_configs]
        self._is_weighted = is_weighted
        weighs_rows = looks_up_weights(self.lowered_tables, is_weighted)
        self._embedding_bag_collection = EmbeddingBagCollection(physical, weighs_rows, device)
        for bag in self._embedding_bag_collection.embedding_bags.values() if weighs_rows else ():
            bag.register_forward_pre_hook(_weights_of_own_type, with_kwargs=True)
        self._rewrite = RowRewriter(
            self.lowered_tables, [config.name for config in physical], is_weighted, bounds_check_mode
        )
        self._fused = FusedCollection(
            self.lowered_tables, self._embedding_bag_collection, is_weighted, bounds_check_mode
        )
        self._relabel = Relabel(self.lowered_tables)
        names = {table.name: table.embedding_names for table in self.tables()}
        self._embedding_names = [name for config in self._configs for name in names[config.name]]
        self._decode = BagDecoder(self.decoded_tables, is_weighted, bounds_check_mode)
        self.id_counts = IdCounts(self.tables())
        self.id_gradients: IdGradients | None = None
        self.reclustering: BackgroundReclustering | None = None
        self.register_load_state_dict_pre_hook(refuse_other_layouts)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors of a batch.

        Args:
            features: ids of every feature (others are ignored), batch size B.

        Returns:
            [B, D] for each feature, in the order of the configs (a sharded collection's come in the order of the ranks).

        Raises:
            ValueError: where a feature or the weights are missing.
            IndexError: where an id is out of bounds and ``bounds_check_mode`` is FATAL.
        """
        return _pooled(self, features)

    def reset_parameters(self) -> None:
        """Initialise parameters and assignments anew, such as after ``to_empty`` of a collection built on "meta"."""
        self._embedding_bag_collection._device = next(self.parameters()).device
        self._embedding_bag_collection.reset_parameters()
        for table in self.lowered_tables:
            table.row_map.reset_parameters()
        self._decoders.reset_parameters()

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As of any module; where ``fn`` gives a collection built on "meta" its memory, the collection is initialised.

        ``DistributedModelParallel`` materialises by ``apply`` what it leaves unsharded, such as a collection of decode
        tables only. It resets modules with parameters of their own, zeroes the buffers of the others, and loses optimizers
        that were applied in backward.
        """
        requests = {name: requests_of(parameter) for name, parameter in self.named_parameters()}
        was_meta = _is_meta(self)
        super().apply(fn)
        if was_meta and not _is_meta(self):
            self.reset_parameters()
            for name, parameter in self.named_parameters():
                apply_requests(requests[name], parameter)
        return self

    def codebook_parameters(self) -> Iterator[nn.Parameter]:
        """The weights of all physical tables: what TorchRec shards, and fused kernels train.

        The other parameters, of decoders and projections, are dense ones, of any shape: leave them to the optimizer of the
        model's dense layers.
        """
        return self._embedding_bag_collection.parameters()

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The *logical* configs, as given."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether KJTs must carry weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        if not self.lowered_tables:
            return next(self.parameters()).device
        return self._embedding_bag_collection.device

    def codebook(self, physical_table: str) -> nn.Parameter:
        """The weight of a physical table, [rows, dim]."""
        return self._embedding_bag_collection.embedding_bags[physical_table].weight

    @torch.no_grad()
    def dense_weight(self, table: str) -> Tensor:
        """The full table that this one stands for: row v is the vector of id v outside training.

        Args:
            table: name of a logical table.

        Returns:
            float32 [num_embeddings, embedding_dim], detached. This is the big table: mind its size.

        Raises:
            ValueError: where there is no such table.
        """
        found = {candidate.name: candidate for candidate in self.tables()}.get(table)
        if found is None:
            raise ValueError(f"No table {table!r}; the tables are {[config.name for config in self._configs]}.")
        if isinstance(found, DecodedTable):
            return decoded_weight(found)
        return dense_weight(found, [self.codebook(name) for name in found.physical_names])

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes stored for each table, and how many times fewer than the full table's, counted both ways.

        Args:
            optimizer: the one that trains the parameters, so that its state is counted too.
        """
        optimizer_bytes = {
            name: optimizer_state_bytes(optimizer, self.codebook(name))
            for table in self.lowered_tables
            for name in table.physical_names
        }
        return memory_report(self._configs, self.tables(), optimizer_bytes, optimizer)

    def grow(self, table: str, num_embeddings: int) -> None:
        """Take in more ids, between two steps: those there were keep their vectors.

        Parameters stay the same objects with their optimizer state. Only for methods whose parameters do not depend on the
        number of ids.

        Args:
            table: name of a logical table.
            num_embeddings: how many ids it is to have, at least as many as it has.

        Raises:
            ValueError: where there is no such table, it would shrink, or has parameters sized by id; nothing has changed.
        """
        refuse_while_reclustering(self)
        grow_table(check_growth(self.tables(), table, num_embeddings), num_embeddings)

    def tables(self) -> list[Table]:
        """Those of row methods, then those of decode methods."""
        return [*self.lowered_tables, *self.decoded_tables]


@torch.fx.wrap  # TorchRec's pipelines trace models; they need not look inside
def _pooled(collection: CompressedEmbeddingBagCollection, features: KeyedJaggedTensor) -> KeyedTensor:
    rows = None
    if collection.lowered_tables:
        pooled = collection._fused(features)
        if pooled is None:
            pooled = collection._embedding_bag_collection(collection._rewrite(features))
        rows = collection._relabel(pooled, collection._relabel.factors(features))
    vectors = rows
    if vectors is None or collection.decoded_tables:
        vectors = join(rows, collection._decode(features), collection._embedding_names)
    if collection.training and torch.is_grad_enabled():
        collection.id_counts.observe(features)
    if collection.id_gradients is not None:
        collection.id_gradients.observe(features, vectors)
    return vectors


def _weights_of_own_type(bag: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A hook before a lookup: torch wants the weights of rows in the type of the table."""
    return args, {**kwargs, "per_sample_weights": kwargs["per_sample_weights"].to(bag.weight.dtype)}


def refuse_other_layouts(collection: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: nothing is changed where the state dict is that of other tables."""
    check_layouts([*collection.lowered_tables, *collection.decoded_tables], state, prefix)  # type: ignore[misc]


def _is_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def decoded_weight(table: DecodedTable) -> Tensor:
    """The vector of every id of a decode table outside training: [num_embeddings, embedding_dim], float32."""
    decoder, was_training = table.decoder, table.decoder.training
    device = next(decoder.parameters()).device
    out_VD = torch.empty(table.config.num_embeddings, table.config.embedding_dim, device=device)
    decoder.eval()  # norms by the statistics of a batch would depend on the ids computed together, and learn from them
    try:
        # Fewer ids at a time than rows need: a decoder's own values are many times as many as its vectors.
        for ids_N in id_chunks(table.config.num_embeddings, device, size=1 << 14):
            out_VD[ids_N[0] : ids_N[-1] + 1] = decoder(ids_N)
    finally:
        decoder.train(was_training)
    return out_VD


def dense_weight(table: LoweredTable, weights: Sequence[Tensor]) -> Tensor:
    """Decode every id of a table from the weights of its physical tables: [num_embeddings, embedding_dim], float32."""
    config, row_map = table.config, table.row_map
    out_VD = torch.empty(config.num_embeddings, config.embedding_dim, device=weights[0].device)
    for ids_N in id_chunks(config.num_embeddings, weights[0].device):
        rows_CNR = row_map.rows(ids_N)
        factors_CNR = (
            row_map.row_weights(ids_N).expand_as(rows_CNR) if row_map.has_row_weights else [None] * len(rows_CNR)
        )
        columns = []
        for weight, rows_NR, factors_NR in zip(weights, rows_CNR, factors_CNR, strict=True):
            vectors_NRD = weight[rows_NR].float()
            columns.append((vectors_NRD if factors_NR is None else vectors_NRD * factors_NR.unsqueeze(-1)).sum(1))
        sums_Nd = torch.cat(columns, dim=1) * row_map.scale
        out_VD[ids_N[0] : ids_N[-1] + 1] = sums_Nd if table.projection is None else table.projection(sums_Nd)
    return out_VD
