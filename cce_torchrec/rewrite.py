"""The rewrite of a batch: a KJT of ids becomes the KJT of rows that an ordinary ``EmbeddingBagCollection`` looks up.

Every id of feature f becomes R rows in each of the features ``f:0 .. f:c-1``; a bag of n ids becomes c bags of n * R rows.

Shapes: F logical features, P physical features, B batch size, N ids of one table, C columns, R rows an id and column.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.bounds import BoundsCheck
from cce_torchrec.lowering import LoweredTable
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native import library


def select_features(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """The features called ``names``, in that order (a name may stand twice).

    Raises:
        ValueError: where a feature is missing, or where the features have batch sizes of their own.
    """
    keys = features.keys()
    missing = list(dict.fromkeys(name for name in names if name not in keys))
    if missing:
        raise ValueError(
            f"The KeyedJaggedTensor has no feature {missing}; it has {keys}. Add it, or drop it from the table."
        )
    if features.variable_stride_per_key():
        raise ValueError(
            "The KeyedJaggedTensor has a batch size per feature (stride_per_key_per_rank); compressed collections "
            "support one batch size only: build it with `stride`."
        )
    if keys == names:
        return features
    return features.permute([keys.index(name) for name in names])


def check_weights(features: KeyedJaggedTensor) -> None:
    """Raise a ``ValueError`` where a batch of a weighted collection has no weights."""
    if features.weights_or_none() is None:
        raise ValueError("The collection is weighted (is_weighted=True) but the KeyedJaggedTensor has no weights.")


def looks_up_weights(tables: Sequence[LoweredTable], is_weighted: bool) -> bool:
    """Whether rows of a collection carry weights: those of its KJTs, or those of a row map."""
    return is_weighted or any(table.row_map.has_row_weights for table in tables)


class RowRewriter:
    """Rewrites the ids of some features to the rows of some physical tables; all of them, or one rank's share.

    Args:
        tables: the lowered tables of the collection, all of them: one with row weights gives every table weights.
        physical_tables: names of the physical tables to produce rows for, in the order the lookup expects them.
        is_weighted: whether the KJTs carry weights.
        mode: what to do with ids out of bounds.
    """

    def __init__(
        self,
        tables: Sequence[LoweredTable],
        physical_tables: Sequence[str],
        is_weighted: bool,
        mode: BoundsCheckMode,
    ) -> None:
        table_of = {name: table for table in tables for name in table.physical_names}
        self.tables = list({table_of[name].name: table_of[name] for name in physical_tables}.values())
        self.features = [feature for table in self.tables for feature in table.config.feature_names]
        self._checks = [BoundsCheck(table.config, mode) for table in self.tables]
        self.mode = mode
        self._is_weighted, self._looks_up_weights = is_weighted, looks_up_weights(tables, is_weighted)
        self._layout(physical_tables, table_of)

    def _layout(self, physical_tables: Sequence[str], table_of: dict[str, LoweredTable]) -> None:
        """Precompute where each physical feature comes from."""
        index = {table.name: position for position, table in enumerate(self.tables)}
        first_feature = [0]
        for table in self.tables:
            first_feature.append(first_feature[-1] + len(table.config.feature_names))
        self._feature_ends = first_feature[1:]
        self._keys: list[str] = []
        self.pieces: list[tuple[int, int]] = []  # (table, column) of each physical table
        feature_P: list[int] = []
        for name in physical_tables:
            table = table_of[name]
            position, column = index[table.name], table.physical_names.index(name)
            count = len(table.config.feature_names)
            self.pieces.append((position, column))
            self._keys += table.physical_configs[column].feature_names
            feature_P += range(first_feature[position], first_feature[position] + count)
        whole = [(t, column) for t, table in enumerate(self.tables) for column in range(len(table.row_map.columns))]
        self._whole_tables = self.pieces == whole
        self._feature_P = torch.tensor(feature_P, dtype=torch.int64)
        rows_per_id_F = [table.row_map.rows_per_id for table in self.tables for _ in table.config.feature_names]
        self._rows_per_id_F1 = torch.tensor(rows_per_id_F, dtype=torch.int64).unsqueeze(1)

    @torch.no_grad()
    def __call__(
        self,
        features: KeyedJaggedTensor,
        key_prefix: str = "",
        assigned: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    ) -> KeyedJaggedTensor:
        """Rewrite a batch.

        Args:
            features: ids; must hold every feature of the tables, in any order.
            key_prefix: what the keys of the result begin with.
            assigned: by table, checked ids and their assignments [N, c], where those are not on this rank.

        Returns:
            Rows; keys are the physical features in the order of the physical tables.

        Raises:
            ValueError: where a feature is missing, or the KJT carries no weights in a weighted collection.
            IndexError: where an id is out of bounds and the mode is FATAL.
        """
        features = select_features(features, self.features)
        if not self.features:  # none of this sharding type's tables is on this rank
            return features
        lengths_FB = features.lengths().view(len(self.features), -1)
        self._feature_P = self._feature_P.to(lengths_FB.device)
        self._rows_per_id_F1 = self._rows_per_id_F1.to(lengths_FB.device)
        ends = features.offset_per_key()
        ids = self._split(features.values(), ends)
        return KeyedJaggedTensor(
            keys=[key_prefix + key for key in self._keys] if key_prefix else self._keys,
            values=self._rows(ids, assigned),
            lengths=(lengths_FB * self._rows_per_id_F1.to(lengths_FB.dtype)).index_select(0, self._feature_P).view(-1),
            weights=self._gather(self._weights(features, ids, ends)) if self._looks_up_weights else None,
            stride=features.stride(),
        )

    def _rows(self, ids: list[Tensor], assigned: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The rows of the ids of each table, in the order of the physical tables."""
        if ids[0].device.type != "cpu" or library() is None:
            return self._gather([self._checked_rows(table, ids_N, assigned) for table, ids_N in enumerate(ids)])
        rows = [len(ids_N) * table.row_map.rows_per_id for table, ids_N in zip(self.tables, ids, strict=True)]
        starts: list[list[int | None]] = [[None] * len(table.row_map.columns) for table in self.tables]
        repeats: list[tuple[int, int, int]] = []  # column shards of one column on one rank look up the same rows
        end = 0
        for table, column in self.pieces:
            first = starts[table][column]
            if first is None:
                starts[table][column] = end
            else:
                repeats.append((end, first, rows[table]))
            end += rows[table]
        values_M = torch.empty(end, dtype=torch.int64)
        for table, (ids_N, starts_C) in enumerate(zip(ids, starts, strict=True)):
            known = self.tables[table].name in assigned
            if known or not self.tables[table].row_map.write_rows(ids_N, values_M, starts_C):
                for start, rows_NR in zip(starts_C, self._checked_rows(table, ids_N, assigned), strict=True):
                    if start is not None:
                        values_M[start : start + rows[table]] = rows_NR.reshape(-1)
        for start, first, length in repeats:
            values_M[start : start + length] = values_M[first : first + length]
        return values_M

    def _checked_rows(self, table: int, ids_N: Tensor, assigned: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        row_map, known = self.tables[table].row_map, assigned.get(self.tables[table].name)
        if known is not None:
            assert isinstance(row_map, CCERowMap)
            return row_map.rows_of(*known)
        return row_map.rows(self._checks[table](ids_N) if row_map.bounded else ids_N)

    def _gather(self, pieces: list[Tensor]) -> Tensor:
        """Flatten [C, N, R] pieces, a table each, into the order of the physical tables."""
        if self._whole_tables:
            return torch.cat([piece.reshape(-1) for piece in pieces])
        return torch.cat([pieces[table][column].reshape(-1) for table, column in self.pieces])

    def _weights(self, features: KeyedJaggedTensor, ids: list[Tensor], ends: list[int]) -> list[Tensor]:
        """The weight of every row, a [C, N, R] tensor for each table: that of its id times its own."""
        if self._is_weighted:
            check_weights(features)
        given = self._split(features.weights(), ends) if self._is_weighted else [None] * len(ids)
        return [
            _row_weights(table, *parts) for table, parts in zip(self.tables, zip(ids, given, strict=True), strict=True)
        ]

    def _split(self, values: Tensor, ends: list[int]) -> list[Tensor]:
        """Cut what is stored by feature into what belongs to each table."""
        cuts = [ends[end] for end in self._feature_ends]
        return [values[start:end] for start, end in itertools.pairwise([0, *cuts])]


def _row_weights(table: LoweredTable, ids_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Weights of the rows of one table: [C, N, R]."""
    row_map = table.row_map
    weights_1N1 = torch.ones(1, len(ids_N), 1, device=ids_N.device) if weights_N is None else weights_N.view(1, -1, 1)
    weights_CNR = weights_1N1 * row_map.row_weights(ids_N) if row_map.has_row_weights else weights_1N1
    return weights_CNR.expand(len(row_map.columns), -1, row_map.rows_per_id)


@dataclass(frozen=True)
class _Names:
    """How the outputs of physical features are named when they come in one particular order.

    Attributes:
        outputs: logical outputs in the order of the result.
        physical: the physical features to put side by side first, or ``None`` where they lie right already.
    """

    outputs: list[int]
    physical: list[str] | None


class Relabel:
    """Gives the outputs of the physical features back their logical names: the columns of f side by side are f.

    Also where MEAN pooling divides by the length of the bag, where a method's scale is applied, and then its projection,
    which is linear, so that it commutes with both. Values are not moved where the columns of each feature lie side by side
    already; the keys of the result are then in the order in which the features come (that of the ranks, where tables are
    sharded, as with TorchRec's own collection).
    """

    def __init__(self, tables: Sequence[LoweredTable]) -> None:
        outputs = [(table, f) for table in tables for f in range(len(table.embedding_names))]
        self._physical = [table.output_names(f) for table, f in outputs]
        self._keys = [table.embedding_names[f] for table, f in outputs]
        self._dims = [table.width for table, _ in outputs]
        self._projections = [table.projection for table, _ in outputs]
        self.features = [table.config.feature_names[f] for table, f in outputs]
        self._is_mean_F = torch.tensor([table.is_mean for table, _ in outputs])
        self._scale_F = torch.tensor([table.row_map.scale for table, _ in outputs])
        self.needs_factors = bool(self._is_mean_F.any() or (self._scale_F != 1).any())
        self._names: dict[tuple[str, ...], _Names] = {}

    def factors(self, features: KeyedJaggedTensor) -> Tensor | None:
        """What to multiply the summed vectors of this batch by: [B, F] in config order, or ``None`` for 1."""
        if not self.needs_factors:
            return None
        lengths_FB = select_features(features, self.features).lengths().view(len(self.features), -1)
        is_mean_F, scale_F = self._is_mean_F.to(lengths_FB.device), self._scale_F.to(lengths_FB.device)
        return scale_F / torch.where(is_mean_F, lengths_FB.T.clamp(min=1), 1)

    def __call__(self, pooled: KeyedTensor, factors_BF: Tensor | None) -> KeyedTensor:
        """Rename; move and scale only where needed."""
        arrived = tuple(pooled.keys())
        if arrived not in self._names:
            self._names[arrived] = self._name(list(arrived))
        names = self._names[arrived]
        values_BD = pooled.values()
        if names.physical is not None:
            values_BD = KeyedTensor.regroup([pooled], [names.physical])[0]
        dims = [self._dims[output] for output in names.outputs]
        if factors_BF is not None:
            dims_F = torch.tensor(dims, device=values_BD.device)
            factors_BD = factors_BF[:, names.outputs].repeat_interleave(dims_F, dim=1, output_size=values_BD.shape[1])
            values_BD = values_BD * factors_BD
        if any(projection is not None for projection in self._projections):
            values_BD, dims = self._project(values_BD, names.outputs)
        return KeyedTensor(keys=[self._keys[output] for output in names.outputs], length_per_key=dims, values=values_BD)

    def _project(self, values_BD: Tensor, outputs: list[int]) -> tuple[Tensor, list[int]]:
        """Make vectors of pooled columns where these are not vectors yet; and how wide each output is then."""
        projections = [self._projections[output] for output in outputs]
        parts = values_BD.split([self._dims[output] for output in outputs], dim=1)
        parts = [part if p is None else p(part) for p, part in zip(projections, parts, strict=True)]
        return torch.cat(parts, dim=1), [part.shape[1] for part in parts]

    def _name(self, arrived: list[str]) -> _Names:
        """Find the logical outputs in the physical ones, or how to bring their columns together."""
        first = {physical[0]: output for output, physical in enumerate(self._physical)}
        outputs: list[int] = []
        position = 0
        while position < len(arrived):
            output = first.get(arrived[position])
            width = 0 if output is None else len(self._physical[output])
            if output is None or arrived[position : position + width] != self._physical[output]:
                everything = [name for physical in self._physical for name in physical]
                return _Names(outputs=list(range(len(self._physical))), physical=everything)
            outputs.append(output)
            position += width
        return _Names(outputs=outputs, physical=None)
