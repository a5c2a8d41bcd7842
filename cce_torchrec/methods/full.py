"""Full table: one row an id, nothing compressed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_torchrec.methods.base import Column, RowMap, RowMethod, RowSource, budget_rows


class FullRowMap(RowMap):
    """Row = id."""

    bounded = True

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.columns = (Column(num_embeddings, embedding_dim),)

    def rows(self, ids_N: Tensor) -> Tensor:
        return ids_N.view(1, -1, 1)

    def source(self) -> RowSource | None:
        return RowSource(num_ids=self.columns[0].num_rows)


@dataclass(frozen=True, kw_only=True)
class FullTable(RowMethod):
    """No compression: vector(id) = W[id].

    Example:
        >>> FullTable().num_params(1000, 16)
        16000
    """

    key: ClassVar[str] = "full"

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return num_embeddings * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        budget_rows(cls.key, num_params, embedding_dim, smallest=num_embeddings)
        return {}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        return FullRowMap(num_embeddings, embedding_dim)
