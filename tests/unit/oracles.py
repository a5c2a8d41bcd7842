"""What the library must agree with: plain Python integers, loops over bags, float64. Nothing here calls the library."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Bags = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]
_2_64 = 2**64


def make_kjt(
    bags: Mapping[str, Bags], weights: Mapping[str, Weights] | None = None, dtype: torch.dtype = torch.int64
) -> KeyedJaggedTensor:
    """A batch of bags by feature, in the order of the mapping."""
    values = [number for feature in bags.values() for bag in feature for number in bag]
    lengths = [len(bag) for feature in bags.values() for bag in feature]
    flat = None if weights is None else [w for feature in bags for bag in weights[feature] for w in bag]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor(values, dtype=dtype),
        lengths=torch.tensor(lengths, dtype=torch.int32 if dtype == torch.int32 else torch.int64),
        weights=None if flat is None else torch.tensor(flat),
    )


def pool(vectors_VD: Tensor, bags: Bags, pooling: PoolingType, weights: Weights | None = None) -> Tensor:
    """[B, D]: sum over the bag of weight * vector; divided by the bag's length where MEAN; zeros for an empty bag."""
    pooled = []
    for index, bag in enumerate(bags):
        total = torch.zeros(vectors_VD.shape[1], dtype=vectors_VD.dtype)
        for position, number in enumerate(bag):
            total = total + vectors_VD[number] * (1.0 if weights is None else weights[index][position])
        pooled.append(total / len(bag) if pooling == PoolingType.MEAN and bag else total)
    return torch.stack(pooled)


def python_mix64(word: int) -> int:
    """The splitmix64 finaliser on Python's own integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % _2_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % _2_64
    return word ^ (word >> 31)


def python_seed(*key: object) -> int:
    """The documented 64-bit seed of a key, unsigned."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def python_hash(number: int, num_rows: int, function: int, *key: object) -> int:
    """h_f(id) = floor(top32(a_f * mix64(id ^ seed)) * k / 2^32)."""
    mixed = python_mix64((number % _2_64) ^ python_seed(*key, 0))
    multiplier = python_seed(*key, function + 1) | 1
    return ((mixed * multiplier % _2_64) >> 32) * num_rows >> 32


def python_block(number: int, num_ids: int, num_blocks: int, shift: Fraction = Fraction(0)) -> int:
    """The block of an id, all moved by a part of a block."""
    return math.floor(Fraction(number * num_blocks, num_ids) + shift) % num_blocks


def wilson_hilferty(chi_square: float, degrees: int) -> float:
    """A chi-square statistic as a standard normal one: its cube root is nearly normal."""
    spread = 2 / (9 * degrees)
    return ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5


def uniformity(cells_N: Tensor, num_cells: int) -> float:
    """How many standard deviations the counts of ``num_cells`` equally likely cells lie from chance, either way."""
    counts = torch.bincount(cells_N, minlength=num_cells).double()
    assert len(counts) == num_cells, "a cell out of range"
    expected = len(cells_N) / num_cells
    return wilson_hilferty(float((counts - expected).square().sum() / expected), num_cells - 1)
