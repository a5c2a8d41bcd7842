"""Low-dimensional tables: narrow rows and a projection to the full width; mixed dimensions by popularity."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cce_torchrec.methods.base import Column, Projection, RowMap, RowMethod, TableSpec, check_positive, check_rows
from cce_torchrec.methods.ce import HashedRowMap
from cce_torchrec.methods.full import FullRowMap

_STEP = 4  # FBGEMM takes widths that are multiples of it


class LowDimProjection(Projection):
    """A matrix [d, D]."""

    def __init__(self, dim: int, table: TableSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, table.embedding_dim, dtype=table.dtype, device=table.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        shape, device = self.weight.shape, self.weight.device
        self.weight.copy_(torch.randn(shape, device=device) * len(self.weight) ** -0.5)

    def forward(self, pooled_Bd: Tensor) -> Tensor:
        return pooled_Bd @ self.weight.to(pooled_Bd.dtype)


@dataclass(frozen=True, kw_only=True)
class LowDim(RowMethod):
    """Low-dimensional rows: vector(id) = W[id] P, or W[h(id)] P, with W: [V or k, d] and P: [d, D].

    A projection is linear, so it is applied once a bag, to the sum of its rows; these are rows of an ordinary table, which
    may be sharded. :func:`mixed_dimensions` chooses d for tables of different popularity.

    Sizes: from a budget rows are not shared while they can have four dims, so d is the largest multiple of 4 with d (V + D)
    parameters or fewer, and only these sizes are reached. Budgets below 4 (V + D) buy hashed rows of four dims, to 3
    parameters.

    Args:
        dim: d, a multiple of 4 (the kernels take no others), and not above D.
        num_rows: k, hashed rows; None for a row an id.
        seed: of the hash function; the table's name is part of the seed.

    Raises:
        ValueError: where ``dim`` is not a multiple of 4, or above D.

    Paper: Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021,
    arXiv 1909.11810.

    Example:
        >>> LowDim(dim=4).num_params(10_000, 16)
        40064
        >>> LowDim(dim=4, num_rows=100).num_params(10_000, 16)
        464
    """

    key: ClassVar[str] = "low_dim"

    dim: int
    num_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(dim=self.dim)
        if self.dim % _STEP:
            near = [dim for dim in (self.dim // _STEP * _STEP, -(-self.dim // _STEP) * _STEP) if dim]
            raise ValueError(
                f"dim={self.dim} is not a multiple of {_STEP}, as the kernels want it; the nearest that work are "
                f"{' and '.join(map(str, near))}."
            )
        if self.num_rows is not None:
            check_rows(num_rows=self.num_rows)

    def _check_dim(self, embedding_dim: int) -> None:
        if self.dim > _widest(embedding_dim):
            raise ValueError(
                f"dim={self.dim} is above embedding_dim={embedding_dim}: nothing is projected up; "
                f"the nearest that works is {_widest(embedding_dim)}."
            )

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        self._check_dim(embedding_dim)
        return self.dim * ((self.num_rows or num_embeddings) + embedding_dim)

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        dim = overrides.get("dim", _STEP)
        smallest = dim * (overrides.get("num_rows", 1) + embedding_dim)
        if smallest > num_params:
            raise ValueError(
                f"{cls.key}: a budget of {num_params} parameters is too small at embedding_dim={embedding_dim}; "
                f"the smallest possible is {smallest}."
            )
        if "dim" not in overrides:
            fitting = num_params // (overrides.get("num_rows", num_embeddings) + embedding_dim)
            dim = max(_STEP, min(fitting // _STEP * _STEP, _widest(embedding_dim)))
        is_full = dim * (num_embeddings + embedding_dim) <= num_params
        return {"dim": dim, "num_rows": None if is_full else num_params // dim - embedding_dim}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        self._check_dim(embedding_dim)
        if self.num_rows is None:
            return FullRowMap(num_embeddings, self.dim)
        return HashedRowMap((Column(self.num_rows, self.dim),), (self.seed, table, self.key), device)

    def projection(self, table: TableSpec) -> Projection:
        return LowDimProjection(self.dim, table)


def _widest(embedding_dim: int) -> int:
    """The largest multiple of 4 that is not above D; 4 where D is smaller."""
    return max(_STEP, embedding_dim // _STEP * _STEP)


def mixed_dimensions(frequencies: Sequence[float], embedding_dim: int, temperature: float = 0.3) -> list[int]:
    """Dims of tables by their popularity: d_i = D (f_i / max_j f_j)^alpha.

    The most popular table keeps D dims. Each d_i is rounded to the nearest multiple of 4, 4 at least, which is a ``dim`` of
    :class:`LowDim`.

    Args:
        frequencies: f_i, how often a row of each table (or of each block of ids) is looked up, on average; the scale does
            not matter. A table of V rows with one id an example has f = 1 / V.
        embedding_dim: D.
        temperature: alpha from 0 (all alike) to 1 (dims in proportion to popularity).

    Raises:
        ValueError: for frequencies that are not positive, and temperatures outside [0, 1].

    Paper: Ginart et al., arXiv 1909.11810, the popularity-based rule.

    Example:
        >>> mixed_dimensions([1 / 100, 1 / 10_000, 1 / 1_000_000], embedding_dim=64, temperature=0.3)
        [64, 16, 4]
    """
    check_positive(embedding_dim=embedding_dim)
    if not 0 <= temperature <= 1:
        nearest = 1 if temperature > 1 else 0
        raise ValueError(f"temperature={temperature} is outside [0, 1]; the nearest that works is {nearest}.")
    for frequency in frequencies:
        if not (isfinite(frequency) and frequency > 0):
            raise ValueError(f"A frequency of {frequency} is not a positive number: count each row once at least.")
    widths = [embedding_dim * (frequency / max(frequencies)) ** temperature for frequency in frequencies]
    return [min(_widest(embedding_dim), max(_STEP, _STEP * round(width / _STEP))) for width in widths]
