"""The gradients of the loss by id, recorded while a model trains, so that a re-clustering can follow them.

    G(v) = sum of g_o,   T(v) = sum of |g_o| * sum_{o'} |g_o'|           over the occurrences o of id v

g_o is the gradient of its sample's loss by the vector of id v where it occurs, and o' goes over all occurrences, of all
recorded tables of the collection, in the same sample.

Shapes: B samples, N occurrences of one feature, U different ids, D dims, P outputs side by side, W numbers a row.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from cce_torchrec.lowering import Table
from cce_torchrec.sums_by_id import SumsById

MAX_BYTES = 1 << 30


class IdGradients:
    """What was recorded for the tables of one collection on this rank; see :func:`record_gradients`.

    Args:
        tables: those to be re-clustered.
        max_bytes: of the sums, for each table an equal part; ids with the least curvature are forgotten beyond.
    """

    def __init__(self, tables: Sequence[Table], max_bytes: int = MAX_BYTES) -> None:
        self._tables, self._max_bytes = list(tables), max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        part = self._max_bytes // len(self._tables)
        widths = {table.name: table.config.embedding_dim + 1 for table in self._tables}
        self.by_table = {name: SumsById(width, max(1, part // (8 + 4 * width))) for name, width in widths.items()}

    def observe(self, features: KeyedJaggedTensor, pooled: KeyedTensor) -> None:
        """Record the gradient of a batch once it is known; nothing where there will be none.

        Args:
            features: the ids that were looked up on this rank.
            pooled: their vectors, by name of the output.
        """
        if pooled.values().requires_grad:
            offsets = dict(zip(pooled.keys(), pooled.offset_per_key(), strict=False))
            pooled.values().register_hook(partial(self._add, features, offsets))

    @torch.no_grad()
    def _add(self, features: KeyedJaggedTensor, offsets: dict[str, int], gradient_BP: Tensor) -> None:
        gradient_BP = gradient_BP.detach().float() * len(gradient_BP)  # of each sample's loss, not of their mean
        found = [
            _Output(
                table, features[feature], gradient_BP[:, offsets[name] : offsets[name] + table.config.embedding_dim]
            )
            for table in self._tables
            for name, feature in zip(table.embedding_names, table.config.feature_names, strict=True)
        ]
        total_B = torch.stack([output.size_B for output in found]).sum(dim=0)
        for output in found:
            self.by_table[output.table.name].add(*output.rows(total_B))


class _Output:
    """One feature of a batch and the gradient of its pooled vectors."""

    def __init__(self, table: Table, ids: JaggedTensor, gradient_BD: Tensor) -> None:
        self.table, self._gradient_BD = table, gradient_BD
        lengths_B = ids.lengths()
        num_bags, ids_N = len(lengths_B), ids.values().long()
        self._bag_N = torch.arange(num_bags, device=ids_N.device).repeat_interleave(lengths_B, output_size=len(ids_N))
        weights_N = ids.weights_or_none()
        factor_N = torch.ones_like(ids_N, dtype=torch.float32) if weights_N is None else weights_N.float()
        self._factor_N = factor_N / lengths_B[self._bag_N] if table.is_mean else factor_N
        self._norm_B = gradient_BD.norm(dim=1)
        self.size_B = self._norm_B * factor_N.new_zeros(num_bags).index_add_(0, self._bag_N, self._factor_N.abs())
        # Lookups take an id out of bounds for id 0, where they do not raise.
        self._ids_N = torch.where((ids_N >= 0) & (ids_N < table.config.num_embeddings), ids_N, 0)

    def rows(self, total_B: Tensor) -> tuple[Tensor, Tensor]:
        """The ids that occur and what each adds: its gradient, and its share of the bound of the curvature."""
        gradient_ND = self._gradient_BD[self._bag_N] * self._factor_N[:, None]
        bound_N = self._factor_N.abs() * (self._norm_B * total_B)[self._bag_N]
        return self._ids_N, torch.cat([gradient_ND, bound_N[:, None]], dim=1)
