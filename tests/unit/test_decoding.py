"""Decode tables in a collection: pooling, unique ids, names, initial sizes; memory by the batch."""

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.decoding import decode, pool
from cce_torchrec.lowering import decoded_tables
from cce_torchrec.methods import Decoder
from tests.toys import Thin, Waves
from tests.unit.oracles import make_kjt
from tests.unit.oracles import pool as pool_by_loop

V, D = 40, 8


def table(name: str, method, **fields) -> CompressedEmbeddingBagConfig:
    settings = {"num_embeddings": V, "embedding_dim": D, "feature_names": [f"f_{name}"], **fields}
    return CompressedEmbeddingBagConfig(name=name, method=method, **settings)


class Recorder(Decoder):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))
        self.asked: list[Tensor] = []

    def reset_parameters(self) -> None: ...

    def forward(self, ids_N: Tensor) -> Tensor:
        self.asked.append(ids_N)
        return self.weight[ids_N]


def test_an_id_is_computed_once_and_its_gradient_counts_every_time() -> None:
    decoder, ids = Recorder(), torch.tensor([7, 3, 7, 7, 0])
    vectors = decode(decoder, ids)
    assert decoder.asked[0].tolist() == [0, 3, 7]
    assert torch.equal(vectors, decoder.weight[ids])
    vectors.sum().backward()
    assert decoder.weight.grad is not None
    assert decoder.weight.grad[:, 0].tolist() == torch.bincount(ids, minlength=V).tolist()


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_pooling_is_that_of_a_loop(pooling: PoolingType) -> None:
    bags = [[3, 3], [], [1], [0, 5, 9], [], []]
    vectors = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    flat = torch.tensor([number for bag in bags for number in bag])
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int32)
    pooled = pool(vectors[flat], lengths, pooling == PoolingType.MEAN)
    torch.testing.assert_close(pooled, pool_by_loop(vectors, bags, pooling))
    assert torch.autograd.gradcheck(lambda v: pool(v[flat], lengths, pooling == PoolingType.MEAN), vectors)


def test_a_collection_of_decode_tables_only() -> None:
    collection = CompressedEmbeddingBagCollection(
        [table("a", Waves(num_waves=3)), table("b", Waves(num_waves=2), pooling=PoolingType.MEAN)]
    )
    out = collection(make_kjt({"f_b": [[1, 2], []], "other": [[5], [99]], "f_a": [[], [7, 7]]}))
    assert out.keys() == ["f_a", "f_b"]
    for name, bags, pooling in (("a", [[], [7, 7]], PoolingType.SUM), ("b", [[1, 2], []], PoolingType.MEAN)):
        torch.testing.assert_close(out[f"f_{name}"], pool_by_loop(collection.dense_weight(name), bags, pooling))
    assert collection.device == torch.device("cpu")
    assert list(collection.codebook_parameters()) == []


def test_a_weighted_batch_without_weights_is_refused() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", Waves(num_waves=3))], is_weighted=True)
    with pytest.raises(ValueError, match="has no weights"):
        collection(make_kjt({"f_a": [[1]]}))


def test_codebooks_and_dense_parameters_are_told_apart() -> None:
    collection = CompressedEmbeddingBagCollection(
        [table("cce", CCE(num_rows=4, num_columns=2)), table("thin", Thin(num_rows=5)), table("w", Waves(num_waves=2))]
    )
    codebooks = {id(parameter) for parameter in collection.codebook_parameters()}
    names = {name for name, parameter in collection.named_parameters() if id(parameter) not in codebooks}
    assert names == {"_decoders.thin.weight", "_decoders.w.out.weight", "_decoders.w.gain"}
    assert len(codebooks) == 3


def std(**fields) -> float:
    (decoded,) = decoded_tables([table("a", Waves(num_waves=2), **fields)], torch.device("meta"))
    return decoded.decoder._table.std


def test_the_initial_size_is_the_full_tables() -> None:
    assert std() == pytest.approx((1 / V / 3) ** 0.5)
    assert std(weight_init_min=-0.5, weight_init_max=0.5) == pytest.approx((0.25 / 3) ** 0.5)
    assert std(weight_init_min=0.0, weight_init_max=1.0) == pytest.approx(3**-0.5)
    before = torch.get_rng_state()
    assert std(num_embeddings=10**9, init_fn=lambda w: nn.init.normal_(w, std=0.3)) == pytest.approx(0.3, rel=0.01)
    assert std(num_embeddings=10_000, init_fn=nn.init.xavier_uniform_) == pytest.approx(
        (2 / (10_000 + D)) ** 0.5, rel=0.01
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_materialising_as_dmp_does_initialises_and_keeps_optimizers() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    tables = [table("w", Waves(num_waves=2)), table("cce", CCE(num_rows=4, num_columns=2))]
    collection = CompressedEmbeddingBagCollection(tables, device="meta")
    _apply_optimizer_in_backward(torch.optim.SGD, collection._decoders.parameters(), {"lr": 0.1})

    def materialise(module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.full_like(parameter, float("nan"), device="cpu"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")

    collection.apply(materialise)
    fresh = CompressedEmbeddingBagCollection(tables)
    buffers = dict(fresh.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in collection.named_buffers())
    before = {name: parameter.detach().clone() for name, parameter in collection.named_parameters()}
    out = collection(make_kjt({"f_w": [[1, 5]], "f_cce": [[2]]}))
    out.values().sum().backward()
    moved = {name for name, p in collection.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"_decoders.w.out.weight", "_decoders.w.gain"}
    assert out.values().isfinite().all()


def test_a_plain_table_beside_keeps_its_name_and_place() -> None:
    plain = EmbeddingBagConfig(name="plain", num_embeddings=V, embedding_dim=4, feature_names=["p"])
    collection = CompressedEmbeddingBagCollection(
        [table("a", Waves(num_waves=3)), plain, table("b", Waves(num_waves=2))]
    )
    out = collection(make_kjt({"p": [[1]], "f_a": [[2]], "f_b": [[3]]}))
    assert (out.keys(), out.length_per_key()) == (["f_a", "p", "f_b"], [D, 4, D])
    assert torch.equal(out["p"][0], collection.codebook("plain")[1])
