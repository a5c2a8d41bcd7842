"""Low-dimensional rows and a projection: the formula of their paper on bags, sizes, and dims by popularity."""

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import LowDim, mixed_dimensions
from tests.unit.decoders import check_budgets
from tests.unit.oracles import make_kjt, pool, python_hash

V, D = 41, 12
BAGS = [[3], [], [7, 7, 40], [0, 1, 2, 3]]
METHODS = [LowDim(dim=4), LowDim(dim=8, num_rows=10, seed=3), LowDim(dim=12)]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def build(method: LowDim, **fields: object) -> CompressedEmbeddingBagCollection:
    defaults = {"num_embeddings": V, "embedding_dim": D, "init_fn": torch.nn.init.normal_}
    table = CompressedEmbeddingBagConfig(name="t", feature_names=["f"], method=method, **(defaults | fields))
    return CompressedEmbeddingBagCollection(tables=[table])


def parameters(collection: CompressedEmbeddingBagCollection) -> tuple[Tensor, Tensor]:
    """The table and the projection."""
    (projection,) = (p for name, p in collection.named_parameters() if "embedding_bags" not in name)
    return collection.codebook("t"), projection


def dense(rows: Tensor, projection: Tensor, method: LowDim) -> Tensor:
    if method.num_rows is None:
        numbers = list(range(V))
    else:
        numbers = [python_hash(v, method.num_rows, 0, method.seed, "t", "low_dim") for v in range(V)]
    return torch.stack([sum(rows[n, i] * projection[i] for i in range(method.dim)) for n in numbers])


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
@every_method
def test_bags_and_gradients_are_those_of_projected_rows(method: LowDim, pooling: PoolingType) -> None:
    collection = build(method, pooling=pooling)
    rows, projection = parameters(collection)
    assert (tuple(rows.shape), tuple(projection.shape)) == ((method.num_rows or V, method.dim), (method.dim, D))
    assert rows.numel() + projection.numel() == method.num_params(V, D)
    target = torch.randn(len(BAGS), D, generator=torch.Generator().manual_seed(0))
    out = collection(make_kjt({"f": BAGS}))["f"]
    (out * target).sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (rows, projection)]
    expected = pool(dense(*doubles, method), BAGS, pooling)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    (expected * target).sum().backward()
    for tensor, double in zip((rows, projection), doubles, strict=True):
        torch.testing.assert_close(tensor.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        collection.dense_weight("t").double(), dense(*doubles, method).detach(), rtol=1e-4, atol=1e-5
    )


def test_half_precision() -> None:
    collection = build(LowDim(dim=8), data_type=DataType.FP16)
    rows, projection = parameters(collection)
    assert {rows.dtype, projection.dtype} == {torch.float16}
    out = collection(make_kjt({"f": BAGS}))["f"]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], rows[3].float() @ projection.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dim", "num_rows"), [(4, None), (16, None), (8, 200), (32, 50)])
def test_initial_vectors_have_the_spread_of_the_full_table(dim: int, num_rows: int | None) -> None:
    squares = []
    for seed in range(20):
        torch.manual_seed(seed)
        collection = build(LowDim(dim=dim, num_rows=num_rows), num_embeddings=500, embedding_dim=32)
        squares.append(collection.dense_weight("t").square().mean())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(1, rel=0.1)


def test_budgets() -> None:
    check_budgets(LowDim, lambda method: method.num_rows is not None and method.num_rows > 20)


def test_what_a_budget_buys() -> None:
    unit = 4 * (1000 + 32)
    assert LowDim.from_budget(1000, 32, unit) == LowDim(dim=4)
    assert LowDim.from_budget(1000, 32, unit - 1) == LowDim(dim=4, num_rows=999)
    assert LowDim.from_budget(1000, 32, 2 * unit - 1) == LowDim(dim=4)
    assert LowDim.from_budget(1000, 32, 2 * unit) == LowDim(dim=8)
    assert LowDim.from_budget(1000, 32, 10**9) == LowDim(dim=32)
    assert LowDim.from_budget(1000, 30, 10**9) == LowDim(dim=28)
    assert LowDim.from_budget(1000, 32, unit, dim=16) == LowDim(dim=16, num_rows=1032 // 4 - 32)
    assert LowDim.from_budget(1000, 32, 17 * unit, dim=16) == LowDim(dim=16)
    assert LowDim.from_budget(1000, 32, 8000, num_rows=100) == LowDim(dim=32, num_rows=100)
    assert LowDim.from_budget(1000, 32, 2000, num_rows=100) == LowDim(dim=12, num_rows=100)
    with pytest.raises(ValueError, match=r"smallest possible is 528\.$"):
        LowDim.from_budget(1000, 32, 527, num_rows=100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim=0 "),
        ({"dim": 6}, "dim=6 is not a multiple of 4, .* work are 4 and 8"),
        ({"dim": 3}, "dim=3 is not a multiple of 4, .* work are 4"),
        ({"dim": 4, "num_rows": 0}, "num_rows=0 "),
    ],
)
def test_sizes_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowDim(**fields)


def test_rows_wider_than_the_vectors() -> None:
    message = r"dim=16 is above embedding_dim=12: .* works is 12"
    with pytest.raises(ValueError, match=message):
        LowDim(dim=16).num_params(V, 12)
    with pytest.raises(ValueError, match=message):
        LowDim.from_budget(V, 12, 10_000, dim=16)
    with pytest.raises(ValueError, match=rf"Table 't': {message}"):
        build(LowDim(dim=16))


def test_dims_by_popularity() -> None:
    frequencies = [0.5, 0.04, 0.0003, 0.5, 1e-9]
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = mixed_dimensions(frequencies, 64, alpha)
        for frequency, dim in zip(frequencies, found, strict=True):
            exact = 64 * (frequency / 0.5) ** alpha  # lambda f^alpha, lambda = D / (max f)^alpha
            assert dim % 4 == 0
            assert 4 <= dim <= 64
            assert abs(dim - exact) <= 2 or (exact < 4 and dim == 4)
        assert mixed_dimensions([1000 * f for f in frequencies], 64, alpha) == found
    assert mixed_dimensions(frequencies, 64, 0.0) == [64] * 5
    assert mixed_dimensions([3.0, 1.0], 30, 1.0) == [28, 8]
    assert mixed_dimensions([], 64) == []
    assert [LowDim(dim=dim).dim for dim in mixed_dimensions(frequencies, 12)] == [12, 4, 4, 12, 4]


@pytest.mark.parametrize(("frequencies", "alpha"), [([1.0, 0.0], 0.3), ([float("nan")], 0.3), ([float("inf")], 0.3)])
def test_frequencies_that_cannot_be(frequencies: list[float], alpha: float) -> None:
    with pytest.raises(ValueError, match=f"frequency of {frequencies[-1]} "):
        mixed_dimensions(frequencies, 64, alpha)


@pytest.mark.parametrize(("alpha", "nearest"), [(-0.1, 0), (1.5, 1)])
def test_temperatures_that_cannot_be(alpha: float, nearest: int) -> None:
    with pytest.raises(ValueError, match=f"temperature={alpha} .* works is {nearest}"):
        mixed_dimensions([1.0], 64, alpha)
