"""Hash embeddings: the weighted sum of hashed rows of their paper, by loops on Python numbers."""

import pytest
import torch
from torch import Tensor

from cce_torchrec.methods import HashEmbedding
from tests.unit.decoders import build, check_against_dense, check_budgets, check_decoder, initial_std, largest_tensor
from tests.unit.oracles import python_hash

V, D = 41, 8
METHODS = [
    HashEmbedding(num_rows=7, num_weights=20),
    HashEmbedding(num_rows=7, num_weights=20, concat_weights=True),
    HashEmbedding(num_rows=3, num_weights=5, num_hashes=4, seed=5),
    HashEmbedding(num_rows=50, num_weights=3, num_hashes=7, concat_weights=True),
    HashEmbedding(num_rows=2, num_weights=2, num_hashes=1),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def dense(parameters: dict[str, Tensor], method: HashEmbedding, num_embeddings: int = V) -> Tensor:
    key = (method.seed, "t", "hash_embedding")
    components, importance = parameters["components"], parameters["importance"]
    vectors = []
    for number in range(num_embeddings):
        weights = importance[python_hash(number, method.num_weights, 0, *key, "weights")]
        vector = torch.zeros(components.shape[1], dtype=torch.float64)
        for j in range(method.num_hashes):
            vector = vector + weights[j] * components[python_hash(number, method.num_rows, j, *key, "rows")]
        vectors.append(torch.cat([vector, weights]) if method.concat_weights else vector)
    return torch.stack(vectors)


@every_method
def test_it_is_the_weighted_sum_of_its_rows(method: HashEmbedding) -> None:
    check_against_dense(build(method, V, D), lambda parameters: dense(parameters, method), V)


@every_method
def test_it_is_a_decoder(method: HashEmbedding) -> None:
    check_decoder(method, V, D)


def test_any_integer_is_an_id() -> None:
    decoder = build(METHODS[0], V, D)
    assert not decoder.bounded
    assert decoder(torch.tensor([0, -1, 2**62, V + 5])).isfinite().all()


def test_the_tables_name_and_the_seed_choose_the_rows() -> None:
    ids_N = torch.arange(V)
    out = build(HashEmbedding(num_rows=9, num_weights=50), V, D)(ids_N)
    assert not torch.equal(build(HashEmbedding(num_rows=9, num_weights=50, seed=1), V, D)(ids_N), out)
    assert not torch.equal(build(HashEmbedding(num_rows=9, num_weights=50), V, D, name="u")(ids_N), out)


def test_memory_does_not_grow_with_the_table() -> None:
    decoder = build(HashEmbedding(num_rows=100, num_weights=200), 10**7, 16)
    assert largest_tensor(decoder, torch.randint(0, 10**7, (500,))) == 500 * 16


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("num_hashes", [1, 2, 4])
@pytest.mark.parametrize(("num_rows", "num_weights", "dim"), [(10, 50, 8), (100, 1000, 16), (1000, 5000, 64)])
def test_initial_vectors_have_the_spread_of_the_full_table(
    num_rows: int, num_weights: int, dim: int, num_hashes: int, concat: bool
) -> None:
    method = HashEmbedding(num_rows=num_rows, num_weights=num_weights, num_hashes=num_hashes, concat_weights=concat)
    assert initial_std(method, 10**6, dim, draws=40) == pytest.approx(1, rel=0.1)


def test_budgets() -> None:
    check_budgets(HashEmbedding, lambda method: method.num_weights >= 20)  # one of two parameters may be left


def test_what_a_budget_buys() -> None:
    assert HashEmbedding.from_budget(10**6, 16, 64_000) == HashEmbedding(num_rows=2000, num_weights=16_000)
    assert HashEmbedding.from_budget(1000, 16, 66_000) == HashEmbedding(num_rows=4000, num_weights=1000)
    assert HashEmbedding.from_budget(10**6, 16, 1000, num_rows=10) == HashEmbedding(num_rows=10, num_weights=420)
    assert HashEmbedding.from_budget(10**6, 16, 1000, num_weights=100) == HashEmbedding(num_rows=50, num_weights=100)
    concat = HashEmbedding.from_budget(10**6, 16, 1000, concat_weights=True, num_hashes=4)
    assert concat == HashEmbedding(num_rows=41, num_weights=127, num_hashes=4, concat_weights=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_rows": 0, "num_weights": 1}, "num_rows=0 "),
        ({"num_rows": 1, "num_weights": 0}, "num_weights=0 "),
        ({"num_rows": 1, "num_weights": 1, "num_hashes": 0}, "num_hashes=0 "),
        ({"num_rows": 2**31, "num_weights": 1}, "num_rows=2147483648 is above 2147483647"),
        ({"num_rows": 1, "num_weights": 1, "concat_weights": "yes"}, "concat_weights='yes' "),
    ],
)
def test_sizes_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashEmbedding(**fields)


def test_weights_that_leave_no_components() -> None:
    method = HashEmbedding(num_rows=2, num_weights=2, num_hashes=8, concat_weights=True)
    message = "num_hashes=8 leaves no components at embedding_dim=8: use num_hashes=7 or less, or an embedding_dim of 9"
    with pytest.raises(ValueError, match=message):
        method.num_params(V, 8)
    with pytest.raises(ValueError, match=message):
        HashEmbedding.from_budget(V, 8, 1000, num_hashes=8, concat_weights=True)
    assert method.num_params(V, 9) == 2 * 1 + 2 * 8
