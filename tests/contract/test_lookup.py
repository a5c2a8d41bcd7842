"""Every method: pooled vectors and their gradients are those of the full table that it stands for."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, PoolingType, data_type_to_dtype

from cce_torchrec import CompressedEmbeddingBagCollection
from tests.contract.cases import VARIANTS, Variant, budgets, decode, is_bounded, make_table, parameters, table_of
from tests.unit.oracles import make_kjt, pool

V, D = 50, 8
# Single ids, several, none, one id three times, the first and the last.
BAGS = [[3], [], [7, 7, 7, 0], [49, 0, 20, 31, 5], [], [12, 3]]
WEIGHTS = [[0.5], [], [1.0, -2.0, 0.25, 3.0], [1.0, 0.0, 2.0, -1.0, 0.5], [], [4.0, -0.125]]

every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_pooling = pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])


def build(variant: Variant, budget: int, is_weighted: bool = False, **fields: Any) -> CompressedEmbeddingBagCollection:
    method = variant.from_budget(V, D, budget)
    table = make_table(method, num_embeddings=V, embedding_dim=D, feature_names=["f"], init_fn=torch.nn.init.normal_)
    for name, value in fields.items():
        setattr(table, name, value)
    return CompressedEmbeddingBagCollection(tables=[table], is_weighted=is_weighted)


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@every_pooling
@every_method
def test_forward_pools_the_dense_table(variant: Variant, pooling: PoolingType, is_weighted: bool) -> None:
    weights = WEIGHTS if is_weighted else None
    kjt = make_kjt({"f": BAGS}, {"f": WEIGHTS} if is_weighted else None)
    for budget in budgets(variant, V, D):
        collection = build(variant, budget, is_weighted, pooling=pooling)
        out = collection(kjt)
        assert out.keys() == ["f"]
        expected = pool(collection.dense_weight("t"), BAGS, pooling, weights)
        table = table_of(collection, "t")
        torch.testing.assert_close(out["f"], expected, msg=lambda text, t=table: f"{t}: {text}")
        assert not out["f"][1].any()


@every_method
def test_dense_weight_is_the_definition(variant: Variant) -> None:
    for budget in budgets(variant, V, D):
        collection = build(variant, budget)
        dense = collection.dense_weight("t")
        assert (dense.shape, dense.dtype, dense.requires_grad) == ((V, D), torch.float32, False)
        torch.testing.assert_close(dense, decode(collection, "t", parameters(collection)).detach())


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@every_pooling
@every_method
def test_gradients_are_those_of_autograd_in_float64(variant: Variant, pooling: PoolingType, is_weighted: bool) -> None:
    weights = WEIGHTS if is_weighted else None
    collection = build(variant, budgets(variant, V, D)[-2], is_weighted, pooling=pooling)
    target = torch.randn(len(BAGS), D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(out: Tensor) -> Tensor:
        return ((out - target.to(out)) ** 3).sum()

    loss(collection(make_kjt({"f": BAGS}, {"f": WEIGHTS} if is_weighted else None))["f"]).backward()
    doubles = {name: p.detach().double().requires_grad_() for name, p in parameters(collection).items()}
    loss(pool(decode(collection, "t", doubles), BAGS, pooling, weights)).backward()
    for name, parameter in parameters(collection).items():
        grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        largest = float(doubles[name].grad.abs().max())  # its rounding is seen in elements where terms cancel
        torch.testing.assert_close(grad.double(), doubles[name].grad, rtol=1e-4, atol=1e-4 * max(1.0, largest))
        assert grad.any()


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@every_pooling
@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16], ids=lambda data_type: data_type.name)
@every_method
def test_half_precision_tables(variant: Variant, data_type: DataType, pooling: PoolingType, is_weighted: bool) -> None:
    collection = build(variant, budgets(variant, V, D)[-2], is_weighted, data_type=data_type, pooling=pooling)
    for name, parameter in parameters(collection).items():
        # TorchRec's own collection keeps rows of every type but float32 in float16.
        is_rows = not name.startswith("_decoders.")
        assert parameter.dtype == (torch.float16 if is_rows else data_type_to_dtype(data_type))
    out = collection(make_kjt({"f": BAGS}, {"f": WEIGHTS} if is_weighted else None))["f"]
    assert out.dtype == torch.float32
    expected = pool(collection.dense_weight("t"), BAGS, pooling, WEIGHTS if is_weighted else None)
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=2e-2)
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in parameters(collection).values())


@every_method
def test_int32_ids_and_lengths(variant: Variant) -> None:
    collection = build(variant, budgets(variant, V, D)[-2])
    out = collection(make_kjt({"f": BAGS}, dtype=torch.int32))["f"]
    torch.testing.assert_close(out, pool(collection.dense_weight("t"), BAGS, PoolingType.SUM))


@every_method
def test_a_batch_of_empty_bags(variant: Variant) -> None:
    collection = build(variant, budgets(variant, V, D)[-2], pooling=PoolingType.MEAN)
    assert torch.equal(collection(make_kjt({"f": [[], [], []]}))["f"], torch.zeros(3, D))


@every_method
def test_weights_of_a_batch_are_ignored_where_the_collection_is_not_weighted(variant: Variant) -> None:
    collection = build(variant, budgets(variant, V, D)[-2])
    out = collection(make_kjt({"f": BAGS}, {"f": WEIGHTS}))["f"]
    torch.testing.assert_close(out, pool(collection.dense_weight("t"), BAGS, PoolingType.SUM))


@every_method
def test_hashed_methods_take_any_id(variant: Variant) -> None:
    collection = build(variant, budgets(variant, V, D)[-2])
    wild = make_kjt({"f": [[-1], [V], [2**62], [-(2**63)]]})
    if is_bounded(table_of(collection, "t")):
        with pytest.raises(IndexError, match="Table 't': id -1 is outside"):
            collection(wild)
    else:
        assert collection(wild)["f"].isfinite().all()
