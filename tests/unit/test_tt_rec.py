"""TT-Rec: the tensor train of its paper, by loops over digits and ranks; its factorisations and sizes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cce_torchrec.methods import TTRec
from cce_torchrec.methods import tt_rec as module
from cce_torchrec.methods.tt_rec import dim_factors, row_factors, sampled_gaussian
from tests.unit.decoders import build, check_against_dense, check_budgets, check_decoder, initial_std, largest_tensor

METHODS = [
    (TTRec(rank=3, cores=2), 41, 6),
    (TTRec(rank=1, cores=2), 41, 4),
    (TTRec(rank=4), 41, 12),
    (TTRec(rank=(2, 5)), 30, 8),
    (TTRec(rank=(2, 3, 4), cores=4), 50, 16),
    (TTRec(rank=2, cores=4), 3, 24),
]
every_method = pytest.mark.parametrize(("method", "num_embeddings", "dim"), METHODS, ids=str)


def digits_of(number: int, bases: list[int]) -> list[int]:
    """The mixed-radix digits of an id, the last base's the lowest."""
    digits = []
    for base in reversed(bases):
        number, digit = divmod(number, base)
        digits.insert(0, digit)
    assert number == 0
    return digits


def dense(parameters: dict[str, Tensor], num_embeddings: int) -> Tensor:
    """Element (j_1, .., j_n) of a vector: the sum over all ranks of G_1[i_1, 1, j_1, r_1] G_2[i_2, r_1, j_2, r_2] ..."""
    cores = list(parameters.values())
    vectors = []
    for number in range(num_embeddings):
        digits = digits_of(number, [len(core) for core in cores])
        elements = []
        for columns in itertools.product(*(range(core.shape[2]) for core in cores)):
            product = torch.eye(1, dtype=torch.float64)
            for core, digit, column in zip(cores, digits, columns, strict=True):
                product = torch.einsum("ab,bc->ac", product, core[digit, :, column, :])
            elements.append(product.squeeze())
        vectors.append(torch.stack(elements))
    return torch.stack(vectors)


@every_method
def test_it_is_the_tensor_train(method: TTRec, num_embeddings: int, dim: int) -> None:
    decoder = build(method, num_embeddings, dim)
    check_against_dense(decoder, lambda parameters: dense(parameters, num_embeddings), num_embeddings)


@every_method
def test_it_is_a_decoder(method: TTRec, num_embeddings: int, dim: int) -> None:
    check_decoder(method, num_embeddings, dim)


def test_more_ids_than_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5 * 48)  # 5 ids of the largest slice, 4 x 3 x 4
    check_against_dense(build(TTRec(rank=4), 41, 18), lambda parameters: dense(parameters, 41), 41)


def test_memory_does_not_grow_with_the_table() -> None:
    ids_N = torch.randint(0, 10**7, (256,))
    decoder = build(TTRec(rank=8), 10**7, 64)
    assert largest_tensor(decoder, ids_N) <= max(256 * 8 * 4 * 8, max(core.numel() for core in decoder.parameters()))
    many = torch.randint(0, 10**7, (40_000,))
    wide = build(TTRec(rank=32), 10**7, 64)
    assert 40_000 * 32 * 4 * 32 > 10 * module._CHUNK >= 10 * largest_tensor(wide, many)


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("number", [1, 2, 3, 10, 97, 1000, 1001, 12_345, 10**6, 10**7, 8**7 - 1, 8**7 + 1])
def test_rows_are_padded_little_and_every_id_has_its_own_digits(number: int, cores: int) -> None:
    factors = row_factors(number, cores)
    assert math.prod(factors) >= number
    assert max(factors) <= math.ceil(number ** (1 / cores) + 1e-9)
    assert math.prod(factors) <= number * (1 + 1 / number ** (1 / cores)) ** cores
    assert min(factors[0], factors[-1]) >= max(factors[1:-1], default=0)


def test_no_two_ids_share_their_digits() -> None:
    for number in (7, 50, 99):
        bases = list(row_factors(number, 3))
        assert len({tuple(digits_of(v, bases)) for v in range(number)}) == number
        vectors = build(TTRec(rank=2), number, 8)(torch.arange(number))
        assert len(torch.unique(vectors, dim=0)) == number


@pytest.mark.parametrize(
    ("dim", "cores", "factors"),
    [
        (4, 2, (2, 2)),
        (6, 2, (2, 3)),
        (128, 2, (8, 16)),
        (16, 3, (2, 2, 4)),
        (64, 3, (4, 4, 4)),
        (100, 3, (5, 4, 5)),
        (96, 3, (4, 4, 6)),
        (16, 4, (2, 2, 2, 2)),
        (128, 4, (4, 2, 4, 4)),
        (1001, 3, (11, 7, 13)),
    ],
)
def test_dims_are_factored_exactly(dim: int, cores: int, factors: tuple[int, ...]) -> None:
    found = dim_factors(dim, cores)
    assert math.prod(found) == dim
    assert sorted(found) == sorted(factors)
    brute = (
        [f for f in itertools.product(range(2, dim + 1), repeat=2) if math.prod(f) == dim] if cores == 2 else [factors]
    )
    assert sum(found) == min(map(sum, brute))
    assert min(found[0], found[-1]) >= max(found[1:-1], default=0)


@pytest.mark.parametrize(
    ("dim", "cores", "remedy"),
    [
        (4, 3, "2 primes, too few for cores=3: cores=2 would do, or embedding_dim=8"),
        (8, 4, "3 primes, too few for cores=4: cores=3 would do, or embedding_dim=16"),
        (7, 2, "1 primes, too few for cores=2: embedding_dim=6"),
        (1, 2, "0 primes, too few for cores=2: embedding_dim=4"),
        (17, 3, "1 primes, too few for cores=3: embedding_dim=16|18"),
    ],
)
def test_more_cores_than_factors(dim: int, cores: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"embedding_dim={dim} is a product of {remedy}"):
        TTRec(rank=2, cores=cores).num_params(100, dim)
    with pytest.raises(ValueError, match=f"embedding_dim={dim} "):
        TTRec.from_budget(100, dim, 10**6, cores=cores)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 "),
        ({"rank": (2, 0)}, "rank=0 "),
        ({"rank": 2.5}, "rank=2.5 "),
        ({"rank": 2, "cores": 1}, "cores=1 .* works is 2"),
        ({"rank": 2, "cores": 5}, "cores=5 .* works is 4"),
        ({"rank": (2, 2, 2)}, r"rank=\(2, 2, 2\) has 3 bonds, .* cores=4 would do"),
    ],
)
def test_sizes_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTRec(**fields)


def test_the_sampled_gaussian() -> None:
    torch.manual_seed(0)
    x = sampled_gaussian(torch.Size([400_000]), torch.device("cpu"))
    assert x.isfinite().all()
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    assert float(x.std()) == pytest.approx(1, rel=0.005)
    # Against rejection: Gaussian numbers whose size is above 2.
    y = torch.randn(4_000_000)
    y = y[y.abs() > 2] / y[y.abs() > 2].std()
    quantiles = torch.linspace(0.01, 0.99, 24)  # not the median, which no number is near
    torch.testing.assert_close(x.quantile(quantiles), y.quantile(quantiles), rtol=0.02, atol=0.02)
    assert float(x.abs().min()) > 0.8


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize(("num_embeddings", "dim"), [(10, 16), (1000, 64), (10**6, 128)])
def test_initial_vectors_have_the_spread_of_the_full_table(
    cores: int, rank: int, num_embeddings: int, dim: int
) -> None:
    assert initial_std(TTRec(rank=rank, cores=cores), num_embeddings, dim) == pytest.approx(1, rel=0.1)


def test_budgets() -> None:
    check_budgets(TTRec, lambda method: min(method.bonds) >= (20 if method.cores == 2 else 8))


def test_a_rank_beyond_that_of_the_full_table_is_not_chosen() -> None:
    method = TTRec.from_budget(27, 8, 10**9)  # cores of 3 x 2, that is 6 x 6 x 6
    assert method == TTRec(rank=(6, 6))
    assert TTRec.from_budget(27, 8, 10**9, cores=2).cores == 2
    assert TTRec.from_budget(27, 8, 10**9, rank=7) == TTRec(rank=7)
    assert TTRec.from_budget(27, 4, 1000).cores == 2
    with pytest.raises(ValueError, match=r"needs 378 parameters"):
        TTRec.from_budget(27, 8, 377, rank=7)
