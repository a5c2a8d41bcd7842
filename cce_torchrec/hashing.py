"""Seeded 64-bit hash families on int64 tensors: one strong mix of the id, then one multiplication a function.

    y = mix64(id ^ seed),    h_f(id) = floor(top32(a_f * y mod 2^64) * k / 2^32),    f = 1..F

``mix64`` is a bijection with full avalanche (the xor-shift-multiply finaliser of Steele, Lea & Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), so ids that differ in one bit, consecutive ids and multiples of a power of
two all become unrelated 64-bit words. ``a_f`` is a random odd 64-bit number; the top 32 bits of ``a_f * y`` are a
multiply-shift hash (Dietzfelbinger et al., 1997), and the last step maps them to any k without a division and with a bias
below k / 2^32. Ids are never compared to anything: 0, negative and huge ids are ordinary.

Shapes: N ids, F functions.
"""

import hashlib

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 1
_MASK64 = 2**64 - 1


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``word``."""
    return word - 2**64 if word >= 2**63 else word


_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` copies the sign bit."""
    return (words >> bits) & (_MASK64 >> bits)


def mix64(words: Tensor) -> Tensor:
    """Scramble int64 words bijectively: every input bit flips every output bit with probability about 1/2.

    Args:
        words: int64, any shape.

    Returns:
        int64, same shape.
    """
    words = (words ^ _shift_right(words, 30)) * _MULTIPLIER_1
    words = (words ^ _shift_right(words, 27)) * _MULTIPLIER_2
    return words ^ _shift_right(words, 31)


def derive_seed(*key: object) -> int:
    """A 64-bit seed (as a signed int) that is a function of the printed ``key`` alone, on every machine and rank."""
    text = "\x1f".join(str(part) for part in key)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def hash_coefficients(num_functions: int, *key: object, device: torch.device | str | None = None) -> Tensor:
    """The coefficients of ``num_functions`` independent hash functions: everything a hash function stores.

    Args:
        num_functions: F, how many functions the family has.
        *key: what the family is a function of, such as ``(seed, table name, purpose)``.
        device: where to put them.

    Returns:
        int64 [1 + F]: the seed of the mix, then one odd multiplier a function.
    """
    words = [derive_seed(*key, index) for index in range(num_functions + 1)]
    return torch.tensor(words[:1] + [word | 1 for word in words[1:]], dtype=torch.int64, device=device)


def hash_rows(ids_N: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    """Map ids to ``[0, num_rows)`` with every function of a family.

    Args:
        ids_N: int64 [N], any values.
        coefficients: int64 [1 + F], from :func:`hash_coefficients`, on the device of the ids.
        num_rows: k, the range of each function.

    Returns:
        int64 [F, N].

    Raises:
        ValueError: where ``num_rows`` is not in [1, 2^31).

    Example:
        >>> hash_rows(torch.arange(4), hash_coefficients(2, "a seed"), 10).shape
        torch.Size([2, 4])
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"num_rows={num_rows} is outside [1, {MAX_ROWS}]: a hash needs a range it can map to.")
    mixed_N = mix64(ids_N.to(torch.int64) ^ coefficients[0])
    words_FN = mixed_N * coefficients[1:, None]
    top32_FN = words_FN.bitwise_right_shift_(32).bitwise_and_(2**32 - 1)
    return top32_FN.mul_(num_rows).bitwise_right_shift_(32)  # below 2^63: the sign bit is 0
