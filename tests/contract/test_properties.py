"""Any config, bags, ids and types: a result equal to the oracle or an error that says what is wrong, never a wrong row."""

import dataclasses
import re
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from cce_torchrec import METHODS, CompressedEmbeddingBagCollection
from cce_torchrec.methods import MethodConfig
from tests.contract.cases import decode, is_bounded, make_table, parameters, table_of
from tests.unit.oracles import make_kjt, pool

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def values_of(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """What a user may write for a field, sensible or not."""
    if name == "seed":
        return st.integers(0, 3)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint is type(None):
        return st.none()
    if hint is int:
        return st.one_of(st.integers(1, 6), st.integers(1, 40), st.sampled_from([0, 4, 8]))
    if get_origin(hint) is tuple:
        return st.tuples(st.integers(0, 4), st.integers(1, 4))
    return st.one_of([values_of(name, choice) for choice in get_args(hint)])  # a union


class Size(NamedTuple):
    """V and D of a table."""

    num_embeddings: int
    embedding_dim: int


SIZES = st.builds(Size, st.integers(1, 40), st.sampled_from([1, 2, 4, 6, 8, 12, 16]))


@st.composite
def configs(draw: st.DrawFn, method: type[MethodConfig], size: Size) -> MethodConfig:
    """By its fields, or by a budget and some of them; a ``ValueError`` where they cannot be."""
    hints = get_type_hints(method)
    strategies = {field.name: values_of(field.name, hints[field.name]) for field in dataclasses.fields(method)}
    required = {f.name for f in dataclasses.fields(method) if f.default is dataclasses.MISSING}
    by_budget = draw(st.booleans())
    chosen = draw(st.sets(st.sampled_from(sorted(strategies)))) if strategies else set()
    fixed = {name: draw(strategies[name]) for name in sorted(chosen if by_budget else chosen | required)}
    if by_budget:
        budget = draw(st.integers(0, 3 * size.num_embeddings * size.embedding_dim))
        config = method.from_budget(*size, budget, **fixed)
        assert config.num_params(*size) <= budget
        return config
    return method(**fixed)


def ids_of(num_embeddings: int) -> st.SearchStrategy[int]:
    """Often the same few, else any, at times outside the table."""
    few = st.integers(0, min(2, num_embeddings - 1))
    any_id = st.integers(0, num_embeddings - 1)
    outside = st.sampled_from([-1, num_embeddings, 2**40, -(2**63)])
    return st.integers(0, 19).flatmap(lambda kind: outside if kind == 19 else few if kind < 8 else any_id)


def close(data_type: DataType) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if data_type == DataType.FP32 else {"rtol": 2e-2, "atol": 2e-2}


def assert_clear(error: Exception) -> None:
    """It names a value and is a sentence or more."""
    assert re.search(r"\d", str(error)), error
    assert len(str(error).split()) >= 5, error
    assert str(error).endswith("."), error


@every_method
@given(data=st.data())
@EXAMPLES
def test_the_oracle_or_a_clear_error(method: type[MethodConfig], data: st.DataObject) -> None:
    size = data.draw(SIZES)
    pooling = data.draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]))
    data_type = data.draw(st.sampled_from([DataType.FP32, DataType.FP16, DataType.BF16]))
    is_weighted = data.draw(st.booleans())
    torch.manual_seed(0)
    try:
        config = data.draw(configs(method, size))
        table = make_table(config, **size._asdict(), feature_names=["f"], pooling=pooling, data_type=data_type)
        collection = CompressedEmbeddingBagCollection(tables=[table], is_weighted=is_weighted)
    except ValueError as error:
        assert_clear(error)
        return
    assert config.num_params(*size) == sum(parameter.numel() for parameter in collection.parameters())
    # Norms of a batch make a vector a function of its batch; in inference it is one of its id again.
    collection.train(getattr(config, "norm", None) != "batch")

    bags = data.draw(st.lists(st.lists(ids_of(size.num_embeddings), max_size=5), min_size=1, max_size=5))
    number = st.floats(-2, 2, width=16)
    weights = [[data.draw(number) for _ in bag] for bag in bags] if is_weighted else None
    features = make_kjt({"f": bags}, {"f": weights} if weights else None)
    outside = [id_ for bag in bags for id_ in bag if not 0 <= id_ < size.num_embeddings]
    if outside and is_bounded(table_of(collection, "t")):
        with pytest.raises(IndexError, match=rf"id {outside[0]} is outside \[0, {size.num_embeddings}\)"):
            collection(features)
        return
    out = collection(features)["f"]
    assert out.isfinite().all()
    if not outside:  # the oracle knows the ids of the table only
        compare(collection, out, lambda dense: pool(dense, bags, pooling, weights), data_type)


def compare(collection: CompressedEmbeddingBagCollection, out: Tensor, pooled: Any, data_type: DataType) -> None:
    """Vectors, and gradients where these have the precision for it."""
    doubles = {name: p.detach().double().requires_grad_() for name, p in parameters(collection).items()}
    expected = pooled(decode(collection, "t", doubles)).double()  # of decoders in float32
    torch.testing.assert_close(out.double(), expected, **close(data_type))
    if data_type != DataType.FP32:
        return
    factors = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    (out * factors).sum().backward()
    if expected.requires_grad:  # not where all bags are empty
        (expected * factors.double()).sum().backward()
    for name, parameter in parameters(collection).items():
        wanted = doubles[name].grad
        wanted = torch.zeros_like(doubles[name]) if wanted is None else wanted
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-4 * scale, msg=name)
