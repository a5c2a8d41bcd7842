"""Small methods that are not in the registry: one of each kind that has dense parameters.

* :class:`Waves`, a decode method: vector(id) = sin(phi(id)) A tanh(b), with stored phases phi and matrices A, b.
* :class:`Thin`, a row method with a projection: vector(id) = W[h(id)] P.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods import Column, DecodeMethod, Decoder, Projection, RowMap, RowMethod, TableSpec
from cce_torchrec.methods.base import check_positive


class WavesDecoder(Decoder):
    """Has a parameter of one dim and a submodule, stores something by id, and narrow integers."""

    bounded = True
    phases: Tensor
    coefficients: Tensor

    def __init__(self, method: "Waves", table: TableSpec) -> None:
        super().__init__()
        like = {"device": table.device, "dtype": table.dtype}
        self._table, self._key = table, (method.seed, table.name, method.key)
        self.out = nn.Linear(method.num_waves, table.embedding_dim, bias=False, **like)
        self.gain = nn.Parameter(torch.empty(table.embedding_dim, **like))
        self.register_buffer("phases", torch.empty(table.num_embeddings, dtype=torch.int16, device=table.device))
        self.register_buffer("frequencies", torch.empty(method.num_waves, device=table.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.out.reset_parameters()
        nn.init.normal_(self.out.weight, std=self._table.std * (2 / self.out.in_features) ** 0.5)
        nn.init.constant_(self.gain, 1.0)
        if not self.phases.is_meta:
            coefficients = hash_coefficients(1, *self._key).to(self.phases.device)
            ids_V = torch.arange(len(self.phases), device=self.phases.device)
            self.phases.copy_(hash_rows(ids_V, coefficients, 30_000)[0])
            self.frequencies.copy_(torch.arange(1, len(self.frequencies) + 1))

    def forward(self, ids_N: Tensor) -> Tensor:
        weight = self.out.weight if self.out.weight.dtype == torch.float64 else self.out.weight.float()
        phases_N1 = self.phases[ids_N].to(weight.dtype).unsqueeze(1)
        return torch.sin(phases_N1 * self.frequencies.to(weight.dtype)) @ weight.T * self.gain.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Waves(DecodeMethod):
    """A decode method with all that one may have."""

    key: ClassVar[str] = "waves"

    num_waves: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(num_waves=self.num_waves)

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return (self.num_waves + 1) * embedding_dim

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        if num_params < 2 * embedding_dim:
            raise ValueError(f"{cls.key}: {num_params} are too few; the smallest possible is {2 * embedding_dim}.")
        return {"num_waves": min(num_params // embedding_dim - 1, 64)}

    def decoder(self, table: TableSpec) -> Decoder:
        return WavesDecoder(self, table)


class ThinRowMap(RowMap):
    """One hashed row."""

    def __init__(self, method: "Thin", table: str, device: torch.device | None) -> None:
        super().__init__()
        self.columns = (Column(method.num_rows, method.thin_dim),)
        self._key = (method.seed, table, method.key)
        self.register_buffer("coefficients", torch.empty(2, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.coefficients.copy_(hash_coefficients(1, *self._key))

    def rows(self, ids_N: Tensor) -> Tensor:
        return hash_rows(ids_N, self.coefficients, self.columns[0].num_rows).unsqueeze(2)


class ThinProjection(Projection):
    """A matrix [d, D]."""

    def __init__(self, thin_dim: int, table: TableSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(thin_dim, table.embedding_dim, device=table.device, dtype=table.dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, pooled_Bd: Tensor) -> Tensor:
        return pooled_Bd @ self.weight.to(pooled_Bd.dtype)


@dataclass(frozen=True, kw_only=True)
class Thin(RowMethod):
    """Rows of 8 dims and a projection."""

    key: ClassVar[str] = "thin"
    thin_dim: ClassVar[int] = 8

    num_rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(num_rows=self.num_rows)

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.thin_dim * (self.num_rows + embedding_dim)

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        smallest = cls.thin_dim * (1 + embedding_dim)
        if num_params < smallest:
            raise ValueError(f"{cls.key}: {num_params} are too few; the smallest possible is {smallest}.")
        return {"num_rows": num_params // cls.thin_dim - embedding_dim}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        return ThinRowMap(self, table, device)

    def projection(self, table: TableSpec) -> Projection:
        return ThinProjection(self.thin_dim, table)
