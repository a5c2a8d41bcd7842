"""DHE: hash values as numbers, and the perceptron of its paper, by loops on Python numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import DHE
from cce_torchrec.methods import dhe as module
from cce_torchrec.methods.dhe import DHEDecoder
from tests.unit.decoders import build, check_against_dense, check_budgets, check_decoder, initial_std, largest_tensor
from tests.unit.oracles import make_kjt, python_hash

V, D = 37, 6
METHODS = [
    DHE(width=5, num_hashes=7),
    DHE(width=16, num_hashes=32, depth=1, activation="relu", seed=3),
    DHE(width=4, num_hashes=7, depth=3, encoding="gaussian"),
    DHE(width=6, num_hashes=8, encoding="gaussian", activation="relu"),
    DHE(width=8, num_hashes=16, norm="layer"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def encoding(number: int, method: DHE) -> list[float]:
    """Uniform: h / (m - 1) to [-1, 1]. Gaussian: the Box-Muller transform of hash values in (0, 1] and [0, 1)."""
    key = (method.seed, "t", "dhe")
    if method.encoding == "uniform":
        return [python_hash(number, 10**6, i, *key) / (10**6 - 1) * 2 - 1 for i in range(method.num_hashes)]
    pairs = math.ceil(method.num_hashes / 2)
    values = [python_hash(number, 10**6, i, *key) / 10**6 for i in range(2 * pairs)]
    radii = [math.sqrt(-2 * math.log(u + 1e-6)) for u in values[:pairs]]
    angles = [2 * math.pi * u for u in values[pairs:]]
    cosines = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
    sines = [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    return (cosines + sines)[: method.num_hashes]


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def dense(parameters: dict[str, Tensor], method: DHE) -> Tensor:
    x = torch.tensor([encoding(number, method) for number in range(V)], dtype=torch.float64)
    for layer in range(method.depth + 1):
        x = x @ parameters[f"weights.{layer}"].T + parameters[f"biases.{layer}"]
        if layer < method.depth and method.norm == "layer":
            centred = x - x.mean(1, keepdim=True)
            x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            x = x * parameters["scales"][layer] + parameters["shifts"][layer]
        if layer < method.depth:
            x = mish(x) if method.activation == "mish" else x.clamp(min=0)
    return x


@every_method
def test_it_is_the_network_of_its_hashes(method: DHE) -> None:
    check_against_dense(build(method, V, D), lambda parameters: dense(parameters, method), V)


@every_method
def test_it_is_a_decoder(method: DHE) -> None:
    check_decoder(method, V, D)


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_parameters_of_norms_are_counted(norm: str | None) -> None:
    method = DHE(width=8, num_hashes=20, depth=3, norm=norm)
    assert sum(p.numel() for p in build(method, V, D).parameters()) == method.num_params(V, D)


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_encodings_are_distributed_as_they_say(kind: str) -> None:
    decoder = build(DHE(width=2, num_hashes=64, encoding=kind), V, D)
    assert isinstance(decoder, DHEDecoder)
    x_NK = decoder.encode(torch.arange(20_000)).double()
    levels = torch.tensor([-0.9, -0.5, 0.0, 0.5, 0.9], dtype=torch.float64)
    cdf: Callable[[Tensor], Tensor] = torch.special.ndtr if kind == "gaussian" else lambda x: (x + 1) / 2
    for level in levels:
        torch.testing.assert_close((x_NK < level).double().mean(0), cdf(level).expand(64), rtol=0, atol=0.02)
    correlations = torch.corrcoef(x_NK.T) - torch.eye(64)
    assert float(correlations.abs().max()) < 0.04
    assert len(torch.unique(x_NK[:2000], dim=0)) == 2000


def test_any_integer_is_an_id() -> None:
    decoder = build(METHODS[0], V, D)
    out = decoder(torch.tensor([0, -1, 2**62, V + 5]))
    assert not decoder.bounded
    assert out.isfinite().all()
    assert len(torch.unique(out, dim=0)) == 4


def test_more_ids_than_are_hashed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5 * 7)
    check_against_dense(build(METHODS[0], V, D), lambda parameters: dense(parameters, METHODS[0]), V)


def test_batch_norm_is_that_of_the_batch_in_training_and_running_outside() -> None:
    method = DHE(width=8, num_hashes=16, norm="batch")
    decoder, ids_N = build(method, V, D), torch.arange(V)
    assert isinstance(decoder, DHEDecoder)
    x = decoder.encode(ids_N)
    for layer in range(2):
        bn = torch.nn.BatchNorm1d(8)
        with torch.no_grad():
            decoder.scales[layer].uniform_(0.5, 2)
            bn.weight.copy_(decoder.scales[layer])
        x = torch.nn.functional.mish(bn(x @ decoder.weights[layer].T + decoder.biases[layer]))
    expected = x @ decoder.weights[2].T + decoder.biases[2]
    out = decoder(ids_N)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(decoder.running_means[1], bn.running_mean)
    torch.testing.assert_close(decoder.running_vars[1], bn.running_var)
    again = decoder(ids_N.flip(0)[:5])  # a second batch before backward, then none and one
    (out.square().sum() + again.square().sum() + decoder(ids_N[:1]).sum() + decoder(ids_N[:0]).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    decoder.eval()
    before = decoder.running_means.clone()
    torch.testing.assert_close(decoder(ids_N[:3]), decoder(ids_N)[:3])
    assert torch.equal(before, decoder.running_means)
    twin = build(method, V, D, seed=1).eval()
    twin.load_state_dict(decoder.state_dict())
    assert torch.equal(twin(ids_N), decoder(ids_N))


def test_the_dense_table_of_a_batch_norm_is_that_of_inference() -> None:
    method = DHE(width=8, num_hashes=16, norm="batch")
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=8, feature_names=["f"], method=method
    )
    collection, features = CompressedEmbeddingBagCollection(tables=[table]), make_kjt({"f": [[v] for v in range(V)]})
    collection(features)  # the statistics have moved on
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    dense = collection.dense_weight("t")
    assert collection.training
    assert all(part.training for part in collection.modules())
    torch.testing.assert_close(collection.state_dict(), before, rtol=0, atol=0)
    assert not torch.allclose(collection(features)["f"], dense)
    collection.load_state_dict(before)
    torch.testing.assert_close(collection.eval()(features)["f"].detach(), dense)


def test_the_tables_name_and_the_seed_choose_the_hashes() -> None:
    def encode(seed: int, name: str) -> Tensor:
        decoder = build(DHE(width=2, num_hashes=4, seed=seed), V, D, name=name)
        assert isinstance(decoder, DHEDecoder)
        return decoder.encode(torch.arange(V))

    assert torch.equal(encode(0, "t"), encode(0, "t"))
    assert not torch.equal(encode(0, "t"), encode(1, "t"))
    assert not torch.equal(encode(0, "t"), encode(0, "u"))


def test_memory_is_that_of_the_ids() -> None:
    assert largest_tensor(build(DHE(width=16), 10**7, D), torch.arange(256)) == 1024 * 256
    many = torch.arange(20_000)
    assert largest_tensor(build(DHE(width=16), 10**7, D), many) == 20_000 * 1024
    assert module._CHUNK <= 20_000 * 1024 // 4  # of hash values, 8 bytes each


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(("width", "num_hashes", "depth"), [(1, 8, 2), (8, 64, 5), (64, 256, 3), (256, 1024, 2)])
def test_initial_vectors_have_the_spread_of_the_full_table(
    width: int, num_hashes: int, depth: int, activation: str, kind: str, norm: str | None
) -> None:
    if norm == "layer" and width == 1:
        return  # the norm of one unit is 0
    width = max(width, 2) if norm == "layer" else width  # the layer norm of one unit is 0
    method = DHE(width=width, num_hashes=num_hashes, depth=depth, activation=activation, encoding=kind, norm=norm)
    assert initial_std(method, 10**6, 16, draws=3) == pytest.approx(1, rel=0.1)


def test_units_that_are_the_same_for_all_ids_are_not_scaled() -> None:
    for depth in range(1, 12):  # the layer norm of two units is (1, -1) or (-1, 1)
        decoder = build(DHE(width=2, num_hashes=1, depth=depth, norm="layer"), V, D, dtype=torch.float16)
        assert decoder(torch.arange(V)).isfinite().all()
        assert max(float(parameter.detach().abs().max()) for parameter in decoder.parameters()) < 1e4


def test_initial_vectors_of_different_ids_are_not_alike() -> None:
    for depth in (1, 2, 5):
        out_ND = build(DHE(width=128, num_hashes=512, depth=depth), 10**6, 64)(torch.arange(5000, 5500)).detach()
        cosines = torch.corrcoef(out_ND) - torch.eye(500)
        assert float(cosines.mean().abs()) < 0.02


def test_budgets() -> None:
    check_budgets(DHE, lambda method: method.width >= 4)


def test_what_a_budget_buys() -> None:
    assert DHE.from_budget(10**6, 64, 10**6).num_hashes >= 1024
    small = DHE.from_budget(1000, 16, 8000)
    assert 8 * small.width - 7 <= small.num_hashes < 12 * small.width
    assert DHE.from_budget(1000, 16, 8000, num_hashes=100).num_hashes == 100
    assert DHE.from_budget(1000, 16, 8000, width=10).width == 10
    assert DHE.from_budget(1000, 16, 8000, depth=4, norm="layer").num_params(1000, 16) > 7600
    assert DHE.from_budget(1000, 16, 100, norm="layer").width == 2
    with pytest.raises(ValueError, match=r"smallest possible is 306\.$"):  # 10 x (1 + 1) + 10 x 11 + 16 x 11
        DHE.from_budget(1000, 16, 100, width=10, num_hashes=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width=0 "),
        ({"width": 2, "num_hashes": 0}, "num_hashes=0 "),
        ({"width": 2, "depth": -1}, "depth=-1 "),
        ({"width": 2, "encoding": "normal"}, "encoding='normal' is not one of uniform, gaussian"),
        ({"width": 2, "activation": "gelu"}, "activation='gelu' is not one of mish, relu"),
        ({"width": 1, "norm": "layer"}, "width=1 has a layer norm .* works is 2"),
        ({"width": 2, "norm": "group"}, "norm='group' is not one of batch, layer"),
    ],
)
def test_sizes_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DHE(**fields)
