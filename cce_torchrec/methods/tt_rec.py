"""TT-Rec: the table as a tensor train, a chain of small cores whose slices are multiplied."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from math import erfc, exp, isqrt, pi, prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cce_torchrec.methods.base import DecodeMethod, Decoder, TableSpec, check_positive

_CORES = (2, 3, 4)
_CHUNK = 1 << 23  # floats of core slices that are gathered at once
_THRESHOLD = 2.0  # of the sampled Gaussian: no value of a core starts nearer to 0, in standard deviations


class TTRecDecoder(Decoder):
    """Core slices chosen by the digits of an id, multiplied from left to right.

    Parameters: ``cores``, of which core k is [V_k, R_{k-1}, D_k, R_k]; R_0 = R_n = 1.
    """

    bounded = True

    def __init__(self, method: "TTRec", table: TableSpec) -> None:
        super().__init__()
        self._std = table.std
        shapes = method.core_shapes(table.num_embeddings, table.embedding_dim)
        options: dict[str, Any] = {"dtype": table.dtype, "device": table.device}
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape, **options)) for shape in shapes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # An element of a vector is a sum over the paths through the bonds of products of one number a core.
        paths = prod(core.shape[3] for core in self.cores)
        std = (self._std**2 / paths) ** (0.5 / len(self.cores))
        for core in self.cores:
            core.copy_(sampled_gaussian(core.shape, core.device) * std)

    def forward(self, ids_N: Tensor) -> Tensor:
        cores = [core.float() for core in self.cores]
        chunk = max(1, _CHUNK // max(core[0].numel() for core in cores))
        if len(ids_N) <= chunk:
            return _multiply(ids_N, *cores)
        # The slices are many times larger than the vectors: they are gathered anew in backward, not kept.
        return torch.cat([checkpoint(_multiply, part, *cores, use_reentrant=False) for part in ids_N.split(chunk)])


def _multiply(ids_N: Tensor, *cores: Tensor) -> Tensor:
    """Vectors [N, D]; the digits of an id are its mixed-radix number, the last core's the lowest."""
    digits: list[Tensor] = []
    for core in reversed(cores):
        digits.insert(0, ids_N % len(core))
        ids_N = ids_N // len(core)
    out_NPR = cores[0].new_ones(len(ids_N), 1, 1)  # P dims so far, R paths that end there
    for core, digit_N in zip(cores, digits, strict=True):
        dims, next_ranks = core.shape[2:]
        slices_NRQ = core.flatten(2).index_select(0, digit_N)
        out_NPR = (out_NPR @ slices_NRQ).view(len(ids_N), out_NPR.shape[1] * dims, next_ranks)
    return out_NPR.squeeze(2)


def sampled_gaussian(shape: torch.Size, device: torch.device) -> Tensor:
    """Numbers of a Gaussian without its middle (|x| <= 2), scaled to variance 1: products of them do not pile up at 0."""
    tail = erfc(_THRESHOLD / sqrt(2)) / 2  # P(x > threshold)
    variance = 1 + _THRESHOLD * exp(-(_THRESHOLD**2) / 2) / sqrt(2 * pi) / tail
    size = -torch.special.ndtri((1 - torch.rand(shape, device=device)) * tail)
    sign = torch.randint(0, 2, shape, device=device) * 2 - 1
    return size * sign / sqrt(variance)


def row_factors(num_embeddings: int, cores: int) -> tuple[int, ...]:
    """Nearly equal factors whose product is V or little above; the smallest lie in the middle, where slices are largest."""
    factors, left = [], num_embeddings
    for remaining in range(cores, 0, -1):
        factor = next(f for f in count(round(left ** (1 / remaining)) or 1) if f**remaining >= left)
        factors.append(factor)
        left = -(-left // factor)
    return _largest_outside(factors)


def dim_factors(embedding_dim: int, cores: int) -> tuple[int, ...]:
    """The most equal factors above 1 whose product is D; the smallest lie in the middle.

    Raises:
        ValueError: where D has fewer prime factors than there are cores.
    """
    primes = list(_prime_factors(embedding_dim))
    if len(primes) < cores:
        near = next(
            dim
            for step in count(1)
            for dim in (embedding_dim - step, embedding_dim + step)
            if dim > 0 and len(list(_prime_factors(dim))) >= cores
        )
        fewer = f"cores={min(len(primes), max(_CORES))} would do, or " if len(primes) >= min(_CORES) else ""
        raise ValueError(
            f"embedding_dim={embedding_dim} is a product of {len(primes)} primes, too few for cores={cores}: "
            f"{fewer}embedding_dim={near}."
        )
    return _largest_outside(list(min(_splits(embedding_dim, cores), key=sum)))


def _splits(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``number`` as a product of factors above 1."""
    if parts == 1:
        yield (number,)
        return
    for factor in range(2, number // 2 + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in _splits(number // factor, parts - 1))


def _prime_factors(number: int) -> Iterator[int]:
    for prime in range(2, isqrt(number) + 1):
        while number % prime == 0:
            yield prime
            number //= prime
    if number > 1:
        yield number


def _largest_outside(factors: list[int]) -> tuple[int, ...]:
    *middle, left, right = sorted(factors)
    return (left, *middle, right)


@dataclass(frozen=True, kw_only=True)
class TTRec(DecodeMethod):
    """TT-Rec: vector(id) = G_1[i_1] G_2[i_2] ... G_n[i_n], where i_1 .. i_n are the digits of the id in base V_1 .. V_n.

    V is padded up to V_1 x ... x V_n and D is D_1 x ... x D_n exactly; G_k[i] is an R_{k-1} x D_k x R_k slice of core k, and
    R_0 = R_n = 1. No two ids have the same digits. Cores start with numbers of the paper's sampled Gaussian, scaled so that
    vectors have the standard deviation of the full table's, which the paper's only approximate.

    A budget is filled with bonds that differ by up to a half where that comes nearer to it than equal ones. Sizes: those of
    whole ranks, so within 5% below the budget from rank 8 on with three or four cores, and from rank 20 on with two; small
    ranks are coarser (with two cores, rank 1 is followed by twice the size). A rank above that of the full table would lie
    idle and is not chosen.

    Args:
        rank: R of every bond between two cores, or the bonds one by one.
        cores: n, 2 to 4; D must have as many prime factors. From a budget, 3 where D has them, else 2.

    Raises:
        ValueError: where D has too few factors; it names what works.

    Paper: Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021,
    arXiv 2101.11714.

    Example:
        >>> TTRec(rank=8).core_shapes(10_000, 16)
        [(22, 1, 2, 8), (21, 8, 2, 8), (22, 8, 4, 1)]
        >>> TTRec(rank=8).num_params(10_000, 16)
        3744
    """

    key: ClassVar[str] = "tt_rec"

    rank: int | tuple[int, ...]
    cores: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.cores, int) or self.cores not in _CORES:
            nearest = min(_CORES) if not isinstance(self.cores, int) or self.cores < min(_CORES) else max(_CORES)
            raise ValueError(f"cores={self.cores!r} is not one of {_CORES}; the nearest that works is {nearest}.")
        for bond in self.bonds:
            check_positive(rank=bond)
        if len(self.bonds) != self.cores - 1:
            raise ValueError(
                f"rank={self.rank} has {len(self.bonds)} bonds, but cores={self.cores} have {self.cores - 1} between them: "
                f"cores={len(self.bonds) + 1} would do, or one number."
            )

    @property
    def bonds(self) -> tuple[int, ...]:
        """R_1 .. R_{n-1}."""
        return self.rank if isinstance(self.rank, tuple) else (self.rank,) * (self.cores - 1)

    def core_shapes(self, num_embeddings: int, embedding_dim: int) -> list[tuple[int, int, int, int]]:
        """(V_k, R_{k-1}, D_k, R_k) of each core."""
        dims = dim_factors(embedding_dim, self.cores)
        ranks = pairwise((1, *self.bonds, 1))
        return [
            (rows, left, dim, right)
            for rows, dim, (left, right) in zip(row_factors(num_embeddings, self.cores), dims, ranks, strict=True)
        ]

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return sum(prod(shape) for shape in self.core_shapes(num_embeddings, embedding_dim))

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        rank = overrides.get("rank")
        enough = len(list(_prime_factors(embedding_dim))) >= 3
        cores = len(rank) + 1 if isinstance(rank, tuple) else overrides.get("cores", 3 if enough else 2)
        if rank is not None:
            return {"cores": cores}
        smallest = cls(rank=1, cores=cores).core_shapes(num_embeddings, embedding_dim)
        widths = [rows * dim for rows, _, dim, _ in smallest]
        if sum(widths) > num_params:
            raise ValueError(
                f"{cls.key}: a budget of {num_params} parameters is too small for num_embeddings={num_embeddings}, "
                f"embedding_dim={embedding_dim} and cores={cores}; the smallest possible is {sum(widths)}."
            )
        return {"rank": _largest_bonds(widths, num_params), "cores": cores}

    def decoder(self, table: TableSpec) -> Decoder:
        return TTRecDecoder(self, table)


def _largest_bonds(widths: list[int], num_params: int) -> tuple[int, ...]:
    """The bonds with the most parameters within a budget; outer ones are r, the one between them s with r/2 <= s <= 3r/2.

    Args:
        widths: V_k D_k of each core.
        num_params: the budget, at least that of rank 1.
    """
    caps = [min(prod(widths[:bond]), prod(widths[bond:])) for bond in range(1, len(widths))]  # ranks of the full table

    def capped(outer: int, inner: int) -> tuple[int, ...]:
        return tuple(map(min, caps, (outer, inner, outer)))

    def size(bonds: tuple[int, ...]) -> int:
        return sum(left * width * right for width, (left, right) in zip(widths, pairwise((1, *bonds, 1)), strict=True))

    best = capped(1, 1)
    last = max(caps[0], caps[-1])
    for outer in range(1, last + 1):
        low, high = (outer + 1) // 2, outer + outer // 2 if outer < last else max(caps)
        if size(capped(outer, low)) > num_params:
            break
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(capped(outer, middle)) <= num_params else (low, middle - 1)
        best = max(best, capped(outer, low), key=lambda bonds: (size(bonds), min(bonds)))
    return best
