"""Random configs, bags, ids and types: a result equal to the oracle or a clear error, never a wrong row."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from cce_torchrec import CompressedEmbeddingBagCollection
from tests.contract.cases import VARIANTS, Variant, decode, is_bounded, make_table, parameters, table_of
from tests.unit.oracles import make_kjt, pool

every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)
some_examples = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def ids_of(draw: st.DrawFn, num_embeddings: int) -> int:
    """Often the same few, else any; at times outside the table."""
    few = st.integers(0, min(2, num_embeddings - 1))
    anything = st.integers(0, num_embeddings - 1)
    outside = st.sampled_from([-1, num_embeddings, 2**40, -(2**63)])
    return draw(st.one_of(few, few, anything, anything, anything, outside))


def bags_of(num_embeddings: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(ids_of(num_embeddings), max_size=5), min_size=1, max_size=6)


def build(
    data: st.DataObject, variant: Variant, num_embeddings: int, **fields: Any
) -> CompressedEmbeddingBagCollection:
    """Whatever fits in a budget, or the smallest that the error names."""
    dim = data.draw(st.sampled_from([1, 4, 6, 8, 12, 16]), "dim")
    budget = data.draw(st.integers(0, 3 * num_embeddings * dim), "budget")
    try:
        method = variant.from_budget(num_embeddings, dim, budget)
    except ValueError as error:
        numbers = [int(word.strip(".,;:")) for word in str(error).split() if word.strip(".,;:").isdigit()]
        if not numbers or "embedding_dim=" in str(error).split(":")[0]:
            return build(data, variant, num_embeddings, **fields)  # a dim that the method does not take
        method = variant.from_budget(num_embeddings, dim, numbers[-1])
        assert method.num_params(num_embeddings, dim) <= numbers[-1]
    assert method.num_params(num_embeddings, dim) <= max(budget, method.num_params(num_embeddings, dim))
    table = make_table(method, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=["f"], **fields)
    return CompressedEmbeddingBagCollection(tables=[table], is_weighted=data.draw(st.booleans(), "is_weighted"))


@every_method
@given(data=st.data())
@some_examples
def test_the_oracle_or_a_clear_error(variant: Variant, data: st.DataObject) -> None:
    torch.manual_seed(0)
    num_embeddings = data.draw(st.integers(1, 60), "num_embeddings")
    pooling = data.draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]), "pooling")
    data_type = data.draw(st.sampled_from([DataType.FP32, DataType.FP16]), "data_type")
    collection = build(data, variant, num_embeddings, pooling=pooling, data_type=data_type)
    bags = data.draw(bags_of(num_embeddings), "bags")
    weights = [[0.25 * (1 + position) for position in range(len(bag))] for bag in bags]
    kjt = make_kjt({"f": bags}, {"f": weights} if collection.is_weighted() else None)
    outside = [number for bag in bags for number in bag if not 0 <= number < num_embeddings]
    if outside and is_bounded(table_of(collection, "t")):
        with pytest.raises(IndexError, match=f"id {outside[0]} is outside"):
            collection(kjt)
        return
    out = collection(kjt)["f"]
    assert out.isfinite().all()
    if outside:  # any number is an id, but the oracle has those of the table only
        return
    assert_oracle(collection, out, bags, pooling, weights if collection.is_weighted() else None)


def assert_oracle(
    collection: CompressedEmbeddingBagCollection,
    out: Tensor,
    bags: list[list[int]],
    pooling: PoolingType,
    weights: list[list[float]] | None,
) -> None:
    """Values and gradients."""
    is_half = any(parameter.dtype == torch.float16 for parameter in collection.parameters())
    close = {"rtol": 1e-2, "atol": 1e-2} if is_half else {"rtol": 1e-4, "atol": 1e-5}
    doubles = {name: p.detach().double().requires_grad_() for name, p in parameters(collection).items()}
    expected = pool(decode(collection, "t", doubles), bags, pooling, weights)
    torch.testing.assert_close(out.double(), expected.double(), **close)
    if is_half:
        return
    coefficients = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    (out * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    for name, parameter in parameters(collection).items():
        assert parameter.grad is not None
        wanted = doubles[name].grad
        torch.testing.assert_close(
            parameter.grad.double(), torch.zeros_like(doubles[name]) if wanted is None else wanted, **close
        )
