"""Where an operator takes ids to pooled vectors in one pass, in place of a rewrite and a lookup of its rows.

It is the fast path of the same tables: parameters, state and results are those of the inner collection, which does whatever
the operator of their device (gpu/dispatch.py) declines (other types, optimizers, rows with weights, ids out of bounds).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.gpu import Lookup, can_look_up
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.native.lookup import LookupTable, Piece
from cce_torchrec.native.stores import ParameterStore, features_of_tables, store_of
from cce_torchrec.rewrite import RowRewriter, check_weights, select_features


class FusedCollection:
    """The operator over an unsharded collection.

    Args:
        tables: those of row methods.
        inner: the collection with their codebooks.
        is_weighted: whether KJTs carry weights.
        mode: what happens to ids out of bounds.
    """

    def __init__(
        self, tables: Sequence[LoweredTable], inner: EmbeddingBagCollection, is_weighted: bool, mode: BoundsCheckMode
    ) -> None:
        self._is_weighted = is_weighted
        self._features = [feature for table in tables for feature in table.config.feature_names]
        self._keys = [
            name for table in tables for f in range(len(table.embedding_names)) for name in table.output_names(f)
        ]
        self._dims = [column.dim for table in tables for _ in table.embedding_names for column in table.row_map.columns]
        laid_out: list[LookupTable] = []
        width = feature = weight = 0
        for table in tables:
            count, pieces, column_start = len(table.config.feature_names), [], width
            for number, column in enumerate(table.row_map.columns):
                outs = tuple(column_start + f * table.width for f in range(count))
                pieces.append(Piece(weight, number, outs))
                weight, column_start = weight + 1, column_start + column.dim
            laid_out.append(LookupTable(table.row_map, feature, tuple(pieces)))
            width, feature = width + count * table.width, feature + count
        bags = [inner.embedding_bags[name] for table in tables for name in table.physical_names]
        self._lookup = Lookup(laid_out, len(self._features), width, ParameterStore(bags), mode)

    def __call__(self, features: KeyedJaggedTensor) -> KeyedTensor | None:
        """Pooled physical features, those of a logical one side by side; ``None`` where the operator declines."""
        features = select_features(features, self._features)
        out_BW = self._lookup(*_batch(features, self._is_weighted))
        return None if out_BW is None else KeyedTensor(keys=self._keys, length_per_key=self._dims, values=out_BW)


def _batch(features: KeyedJaggedTensor, is_weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    if is_weighted:
        check_weights(features)
    return features.values(), features.offsets(), features.weights() if is_weighted else None


class FusedForward:
    """A forward, from ids, of one of TorchRec's lookups.

    Args:
        parts: the operator over the tables of each of its modules.
        rewrite: makes rows of ids, for TorchRec's own forward.
        forward: that.
        is_weighted: whether KJTs carry weights.
    """

    def __init__(
        self, parts: Sequence[Lookup], rewrite: RowRewriter, forward: Callable[..., Tensor], is_weighted: bool
    ) -> None:
        self._parts, self._rewrite, self._forward, self._is_weighted = parts, rewrite, forward, is_weighted

    def __call__(self, ids: KeyedJaggedTensor) -> Tensor:
        """Pooled vectors [B, W] of the physical tables."""
        batch = _batch(select_features(ids, self._rewrite.features), self._is_weighted)
        outs = []
        for part in self._parts:
            out_BW = part(*batch)
            if out_BW is None:
                return self._forward(self._rewrite(ids))
            outs.append(out_BW)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def take_ids(lookup: nn.Module, rewrite: RowRewriter, is_weighted: bool) -> bool:
    """Let one of TorchRec's lookups take ids instead of rows, where the operator can be made for all of its tables.

    Args:
        lookup: of one sharding type on this rank, maybe inside ``DistributedDataParallel``.
        rewrite: from the ids that it will get to the rows that it got.
        is_weighted: whether KJTs carry weights.

    Returns:
        Whether it takes ids from now on.
    """
    grouped: Any = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
    modules = [part.emb_module for part in grouped._emb_modules]
    stores = [store_of(tbe) for tbe in modules]
    sources = [table.row_map.source() for table in rewrite.tables]
    known = [store for store in stores if store is not None]
    if not modules or len(known) < len(stores) or None in sources:
        return False
    if not all(can_look_up(weights) for store in known for weights in store.weights()):
        return False
    parts, first = [], 0
    for tbe, store in zip(modules, known, strict=True):
        tables = _laid_out(rewrite, first, tbe)
        parts.append(Lookup(tables, len(rewrite.features), int(tbe.D_offsets[-1]), store, rewrite.mode))
        first += len(store.weights())
    grouped.forward = FusedForward(parts, rewrite, grouped.forward, is_weighted)
    return True


def _laid_out(rewrite: RowRewriter, first: int, tbe: Any) -> list[LookupTable]:
    """The tables of one of FBGEMM's modules; ``first``: which physical table of the rewrite is its first."""
    columns_F = tbe.D_offsets.tolist()
    pieces: dict[int, list[Piece]] = {}
    for number, (start, count) in enumerate(features_of_tables(tbe)):
        table, column = rewrite.pieces[first + number]
        pieces.setdefault(table, []).append(Piece(number, column, tuple(columns_F[start : start + count])))
    features = itertools.accumulate((len(table.config.feature_names) for table in rewrite.tables), initial=0)
    starts = list(features)
    return [LookupTable(rewrite.tables[t].row_map, starts[t], tuple(of_table)) for t, of_table in pieces.items()]
