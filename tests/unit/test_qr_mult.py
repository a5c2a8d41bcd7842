"""Multiplicative quotient-remainder: the product of its paper, id by id, and what kind of method a QR is."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import METHODS, QR, DecodeMethod, RowMethod
from tests.unit.decoders import build, check_against_dense, check_decoder, initial_std, largest_tensor
from tests.unit.oracles import make_kjt

V, D = 41, 6


def mult(num_remainders: int) -> DecodeMethod:
    method = QR(num_remainders=num_remainders, operation="mult")
    assert isinstance(method, DecodeMethod)
    return method


def dense(parameters: dict[str, Tensor], num_remainders: int) -> Tensor:
    remainders, quotients = parameters["remainders"], parameters["quotients"]
    assert (len(remainders), len(quotients)) == (num_remainders, math.ceil(V / num_remainders))
    return torch.stack([remainders[v % num_remainders] * quotients[v // num_remainders] for v in range(V)])


@pytest.mark.parametrize("remainders", [1, 6, 7, 41])
def test_it_multiplies_remainder_and_quotient_rows(remainders: int) -> None:
    check_against_dense(build(mult(remainders), V, D), lambda parameters: dense(parameters, remainders), V)


@pytest.mark.parametrize("remainders", [1, 6, 50])
def test_it_is_a_decoder(remainders: int) -> None:
    check_decoder(mult(remainders), V, D)


def test_bags_are_pooled_after_multiplying() -> None:
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=D, feature_names=["f"], method=mult(7), init_fn=torch.nn.init.normal_
    )
    collection = CompressedEmbeddingBagCollection(tables=[table])
    parameters = {name.rpartition(".")[2]: p.detach().double() for name, p in collection.named_parameters()}
    r, q = parameters["remainders"], parameters["quotients"]
    out = collection(make_kjt({"f": [[3, 18, 40]]}))["f"].double()
    torch.testing.assert_close(out[0], r[3] * q[0] + r[4] * q[2] + r[5] * q[5], rtol=1e-4, atol=1e-5)
    pooled_first = (r[3] + r[4] + r[5]) * (q[0] + q[2] + q[5])
    assert not torch.allclose(out[0], pooled_first, rtol=0.1)


def test_memory_does_not_grow_with_the_table() -> None:
    decoder = build(mult(1000), 10**6, 16)
    assert largest_tensor(decoder, torch.randint(0, 10**6, (2000,))) == 2000 * 16


@pytest.mark.parametrize(("remainders", "num_embeddings", "dim"), [(10, 100, 8), (300, 1000, 16), (1000, 10**6, 64)])
def test_initial_vectors_have_the_spread_of_the_full_table(remainders: int, num_embeddings: int, dim: int) -> None:
    assert initial_std(mult(remainders), num_embeddings, dim) == pytest.approx(1, rel=0.1)


def test_the_operation_says_what_kind_of_method_it_is() -> None:
    add, product = QR(num_remainders=4), QR(num_remainders=4, operation="mult")
    assert METHODS["qr"] is QR
    for method in (add, QR(num_remainders=4, operation="concat"), QR.from_budget(V, D, 400)):
        assert isinstance(method, QR)
        assert isinstance(method, RowMethod)
        assert not isinstance(method, DecodeMethod)
    for method in (product, dataclasses.replace(add, operation="mult"), QR.from_budget(V, D, 400, operation="mult")):
        assert isinstance(method, QR)
        assert isinstance(method, DecodeMethod)
        assert not isinstance(method, RowMethod)
    assert dataclasses.replace(add, operation="mult") == product != add
    assert dataclasses.replace(product, operation="add") == add
    assert dataclasses.replace(product, num_remainders=5) == QR(num_remainders=5, operation="mult")
    for method in (add, product):
        assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == copy.copy(method) == method
        assert eval(repr(method)) == method
        assert hash(copy.copy(method)) == hash(method)
    with pytest.raises(AttributeError):
        product.num_remainders = 5  # type: ignore[misc]


def test_bad_operations() -> None:
    with pytest.raises(ValueError, match="operation='max' is not one of add, concat, mult"):
        QR(num_remainders=4, operation="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_remainders=0 "):
        QR(num_remainders=0, operation="mult")
    with pytest.raises(TypeError):
        QR(4)  # type: ignore[misc]


@pytest.mark.parametrize("num_embeddings", [1000, 10**5, 10**7])
@pytest.mark.parametrize("dim", [4, 16, 128])
def test_budgets_are_those_of_sums(num_embeddings: int, dim: int) -> None:
    root = math.isqrt(num_embeddings) + 1
    for budget in (2 * root * dim, 3 * root * dim + 5, num_embeddings * dim // 5, num_embeddings * dim // 2):
        product = QR.from_budget(num_embeddings, dim, budget, operation="mult")
        assert product == dataclasses.replace(QR.from_budget(num_embeddings, dim, budget), operation="mult")
        assert 0.95 * budget <= product.num_params(num_embeddings, dim) <= budget
    with pytest.raises(ValueError, match=r"smallest possible is \d+\.$"):
        QR.from_budget(num_embeddings, dim, root * dim, operation="mult")
