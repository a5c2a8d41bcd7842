"""The hashing trick: one hash, or one block of ids, one row, and at will a sign."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cce_torchrec.methods.base import Column, RowMap, RowMethod, budget_rows, check_bool, check_rows
from cce_torchrec.methods.blocks import Assignments, BlockRowMap, check_assignments
from cce_torchrec.methods.ce import HashedRowMap


@dataclass(frozen=True, kw_only=True)
class HashingTrick(RowMethod):
    """The hashing trick: vector(id) = W[h(id)], or with a sign, s(id) W[h(id)].

    A sign hash s(id) = +-1 makes inner products of sums of vectors unbiased: what ids that share a row add to each other
    cancels on average.

    Args:
        num_rows: k, rows of the table.
        sign: whether there is a sign hash, as in the paper. All tables of the collection are then looked up with a weight a
            row, which takes time, so it is off by default, and signed tables are better put in a collection of their own.
        assignments: "hash", or "blocks": h(id) = floor(k id / V), so that V / k consecutive ids share a row. That is as good
            as a hash where ids are numbered at random, and much better where neighbours are alike
            (``docs/results/siblings.md``); ids must then lie in [0, V), and the table cannot grow.
        seed: of the hash functions; the table's name is part of the seed.

    Raises:
        ValueError: sizes below 1, a sign with blocks.

    Paper: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv 0902.2206.

    Example:
        >>> HashingTrick(num_rows=100).num_params(10_000, 16)
        1600
    """

    key: ClassVar[str] = "hashing_trick"

    num_rows: int
    sign: bool = False
    assignments: Assignments = "hash"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(num_rows=self.num_rows)
        check_bool(sign=self.sign)
        check_assignments(assignments=self.assignments)
        if self.sign and self.assignments == "blocks":
            raise ValueError(
                f"sign=True is for ids that a hash brings together; with num_rows={self.num_rows} blocks take sign=False."
            )

    def sizes(self) -> dict[str, Any]:
        sizes = super().sizes()
        plain = {"sign": False, "assignments": "hash"}
        return {name: size for name, size in sizes.items() if name not in plain or size != plain[name]}

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.num_rows * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        return {"num_rows": budget_rows(cls.key, num_params, embedding_dim, smallest=overrides.get("num_rows", 1))}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        columns = (Column(self.num_rows, embedding_dim),)
        if self.assignments == "blocks":
            return BlockRowMap(columns, num_embeddings)
        return HashedRowMap(columns, (self.seed, table, self.key), device, sign=self.sign)
