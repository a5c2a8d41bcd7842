"""Quotient-remainder (QR): an id is the pair (id // m, id % m), each with a small table."""

from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_torchrec.methods.base import (
    Column,
    DecodeMethod,
    Decoder,
    MethodConfig,
    RowMap,
    RowMethod,
    TableSpec,
    budget_rows,
    check_divides,
    check_positive,
)

Operation = Literal["add", "concat", "mult"]


def _num_quotients(num_embeddings: int, num_remainders: int) -> int:
    return -(-num_embeddings // num_remainders)


class QRRowMap(RowMap):
    """Remainder row and quotient row: two rows of one table (add), or one row in each of two columns (concat)."""

    bounded = True

    def __init__(self, num_remainders: int, operation: Operation, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self._num_remainders, self._add = num_remainders, operation == "add"
        quotients = _num_quotients(num_embeddings, num_remainders)
        if self._add:
            self.rows_per_id = 2
            self.columns = (Column(num_remainders + quotients, embedding_dim),)
        else:
            self.columns = (Column(num_remainders, embedding_dim // 2), Column(quotients, embedding_dim // 2))

    def rows(self, ids_N: Tensor) -> Tensor:
        remainder_N, quotient_N = ids_N % self._num_remainders, ids_N // self._num_remainders
        if self._add:
            return torch.stack([remainder_N, quotient_N + self._num_remainders], dim=-1).unsqueeze(0)
        return torch.stack([remainder_N, quotient_N]).unsqueeze(-1)


class QRDecoder(Decoder):
    """Remainder row times quotient row, of each id.

    Parameters: ``remainders`` [m, D], ``quotients`` [ceil(V / m), D].
    """

    bounded = True

    def __init__(self, num_remainders: int, table: TableSpec) -> None:
        super().__init__()
        self._std = table.std
        quotients = _num_quotients(table.num_embeddings, num_remainders)
        options: dict[str, Any] = {"dtype": table.dtype, "device": table.device}
        self.remainders = nn.Parameter(torch.empty(num_remainders, table.embedding_dim, **options))
        self.quotients = nn.Parameter(torch.empty(quotients, table.embedding_dim, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = (3 * self._std) ** 0.5  # each factor has variance bound^2 / 3, the product that squared
        for parameter in (self.remainders, self.quotients):
            parameter.copy_((2 * torch.rand(parameter.shape, device=parameter.device) - 1) * bound)

    def forward(self, ids_N: Tensor) -> Tensor:
        num_remainders = len(self.remainders)
        remainders_ND = F.embedding(ids_N % num_remainders, self.remainders.float())
        return remainders_ND * F.embedding(ids_N // num_remainders, self.quotients.float())


@dataclass(frozen=True, kw_only=True)
class QR(MethodConfig):
    """Quotient-remainder: vector(id) = R[id mod m] + Q[id div m], or another operation; every id has its own pair.

    Sums and concatenations are rows of ordinary tables. A product must be computed id by id, before pooling, so that its
    tables are dense parameters; ``QR(operation="mult")`` is a decode method, where the others are row methods.

    Args:
        num_remainders: m, rows of the remainder table; the quotient table has ceil(V / m).
        operation: "add" or "mult" (both tables ``embedding_dim`` wide) or "concat" (both half as wide).

    Paper: Shi et al., "Compositional Embeddings Using Complementary Partitions", KDD 2020, arXiv 1909.02107.

    Example:
        >>> QR(num_remainders=100).num_params(10_000, 16)
        3200
    """

    key: ClassVar[str] = "qr"

    num_remainders: int
    operation: Operation = "add"

    def __new__(cls, *, operation: Operation | None = None, **sizes: Any) -> Self:
        """A row method or a decode method, as the operation wants it."""
        if cls is QR or operation is not None:
            kind = _MultQR if operation == "mult" else _RowQR
            if not issubclass(kind, cls):  # such as where dataclasses.replace changes the operation
                assert operation is not None
                return cast(Self, kind(operation=operation, **sizes))
            return cast(Self, super().__new__(kind))
        return super().__new__(cls)  # of a copy, which brings its operation later

    def __repr__(self) -> str:
        return f"QR(num_remainders={self.num_remainders}, operation={self.operation!r})"

    def __post_init__(self) -> None:
        check_positive(num_remainders=self.num_remainders)
        if self.operation not in get_args(Operation):
            raise ValueError(f"operation={self.operation!r} is not one of {', '.join(get_args(Operation))}.")

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.operation == "concat":
            check_divides(embedding_dim, 2)
        width = embedding_dim // 2 if self.operation == "concat" else embedding_dim
        return (self.num_remainders + _num_quotients(num_embeddings, self.num_remainders)) * width

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        width = embedding_dim
        if overrides.get("operation") == "concat":
            check_divides(embedding_dim, 2)
            width //= 2
        low, high = max(isqrt(num_embeddings - 1) + 1, 1), num_embeddings
        if "num_remainders" in overrides:
            low = high = overrides["num_remainders"]
        smallest = low + _num_quotients(num_embeddings, low)
        budget = budget_rows(cls.key, num_params, width, smallest)
        while low < high:  # m + ceil(V / m) grows with m from sqrt(V) on
            middle = (low + high + 1) // 2
            if middle + _num_quotients(num_embeddings, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return {"num_remainders": low}


class _RowQR(QR, RowMethod):
    """QR by addition or concatenation."""

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        if self.operation == "concat":
            check_divides(embedding_dim, 2)
        return QRRowMap(self.num_remainders, self.operation, num_embeddings, embedding_dim)


class _MultQR(QR, DecodeMethod):
    """QR by multiplication."""

    def decoder(self, table: TableSpec) -> Decoder:
        return QRDecoder(self.num_remainders, table)
