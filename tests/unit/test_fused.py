"""The native operator against sums of dense vectors, float64 autograd, and Adagrad a row at a time."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods import CCE, CE, PQ, QR, Bloom, FullTable, HashingTrick, LowDim, ResidualCCE
from cce_torchrec.methods.base import RowMethod
from cce_torchrec.native import library, switched_off
from cce_torchrec.native.lookup import FusedLookup, LookupTable, Piece
from cce_torchrec.native.stores import FusedStore

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler on this machine")

V, B = 300, 30
METHODS: dict[str, tuple[RowMethod, int]] = {  # and the dims of a vector
    "cce, uint8": (CCE(num_rows=20, num_columns=4), 64),
    "cce, int16": (CCE(num_rows=257, num_columns=8, num_helper_rows=7), 64),
    "cce, int32": (CCE(num_rows=2**15 + 1, num_columns=4, num_helper_rows=3), 16),
    "cce, one column": (CCE(num_rows=9, num_columns=1), 32),
    "cce, three columns": (CCE(num_rows=9, num_columns=3), 36),
    "cce, odd dims": (CCE(num_rows=9, num_columns=4), 20),
    "cce, wide": (CCE(num_rows=9, num_columns=4), 4 * 128),
    "residual_cce": (ResidualCCE(num_rows=9, num_columns=4, num_levels=4), 32),
    "pq": (PQ(num_rows=9, num_columns=8), 64),
    "ce": (CE(num_rows=9, num_columns=4), 16),
    "bloom": (Bloom(num_rows=30, num_hashes=3), 8),
    "hashing_trick": (HashingTrick(num_rows=30), 16),
    "full": (FullTable(), 12),
    "low_dim": (LowDim(dim=4), 16),
}
every_method = pytest.mark.parametrize("name", METHODS)


def collection_of(name: str, is_weighted: bool = False, **options: Any) -> CompressedEmbeddingBagCollection:
    """Two tables, of two features and of one; the second pools by MEAN."""
    method, dim = METHODS[name]
    torch.manual_seed(0)
    tables = [
        CompressedEmbeddingBagConfig(
            name=table, num_embeddings=V, embedding_dim=dim, feature_names=features, pooling=pooling, method=method,
            init_fn=torch.nn.init.normal_,
        )
        for table, features, pooling in (("t", ["a", "b"], PoolingType.SUM), ("u", ["c"], PoolingType.MEAN))
    ]  # fmt: skip
    return CompressedEmbeddingBagCollection(tables, is_weighted=is_weighted, **options)


def batch_of(single: bool = False, size: int = B, seed: int = 0) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, or of one each; features in another order than the collection's."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.ones(3 * size, dtype=torch.int64)
    if not single:
        lengths = torch.randint(0, 4, (3 * size,), generator=generator)
    count = int(lengths.sum())
    ids = torch.randint(0, V, (count,), generator=generator)
    return KeyedJaggedTensor(["c", "a", "b"], ids, lengths=lengths, weights=torch.rand(count, generator=generator))


def declines(*_: object) -> None:
    raise AssertionError("left to the inner collection")


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("single", [False, True], ids=["bags", "single ids"])
@every_method
def test_vectors_and_gradients(name: str, single: bool, is_weighted: bool) -> None:
    collection, features = collection_of(name, is_weighted), batch_of(single)
    plain = copy.deepcopy(collection)
    collection._embedding_bag_collection.forward = declines  # type: ignore[method-assign]
    out = collection(features)
    with switched_off():
        expected = plain.double()(features)
    assert out.keys() == expected.keys()
    for key in ("a", "b", "c"):
        dense = collection.dense_weight("u" if key == "c" else "t").double()
        bags = features[key].to_dense()
        weights = features[key].to_dense_weights() if is_weighted else [None] * B
        for vector, bag, sample in zip(out[key], bags, weights, strict=True):
            vectors = dense[bag.long()] if sample is None else dense[bag.long()] * sample.double()[:, None]
            total = vectors.sum(0) / (max(len(bag), 1) if key == "c" else 1)
            torch.testing.assert_close(vector.double(), total, rtol=1e-5, atol=1e-4)
    gradient = torch.randn(out.values().shape)
    out.values().backward(gradient)
    expected.values().backward(gradient.to(expected.values().dtype))
    for own, other in zip(collection.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad.double(), other.grad.double(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_SGD], ids=str)
@pytest.mark.parametrize(("columns", "dim"), [(4, 16), (8, 8), (4, 64), (8, 4), (3, 32), (2, 12)])
@pytest.mark.parametrize(("k", "threads"), [(11, 1), (600, 1), (600, 3)], indirect=["threads"])  # a batch has 90 ids
@pytest.mark.usefixtures("threads")
def test_three_steps_of_an_optimizer(k: int, columns: int, dim: int, optimizer: EmbOptimType) -> None:
    learning_rate, eps = 0.3, 1e-3
    row_map = CCE(num_rows=k, num_columns=columns).row_map("t", V, columns * dim, None)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(2 * k, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * columns,
        optimizer=optimizer, learning_rate=0.0, eps=eps,
    )  # fmt: skip
    for weight in tbe.split_embedding_weights():
        torch.nn.init.normal_(weight)
    weights = [weight.double().clone() for weight in tbe.split_embedding_weights()]
    sums = torch.zeros(columns, 2 * k, dtype=torch.float64)
    pieces = tuple(Piece(c, c, (c * dim,)) for c in range(columns))
    lookup = FusedLookup([LookupTable(row_map, 1, pieces)], 3, columns * dim, FusedStore(tbe))  # of 3 features
    tbe.set_learning_rate(learning_rate)  # as a scheduler does
    for step in range(3):
        ids = torch.randint(0, V, (3 * B,), generator=torch.Generator().manual_seed(step))
        rows_CNR = row_map.rows(ids)
        leaves = [weight.clone().requires_grad_() for weight in weights]
        vectors = torch.cat([leaf[rows].sum(1) for leaf, rows in zip(leaves, rows_CNR, strict=True)], dim=1)
        others = torch.full((B,), V + 1)  # of features before and after, of which it must not take notice
        bags = torch.cat([torch.ones(B), torch.full((B,), 3), torch.ones(B)]).long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), bags.cumsum(0)])
        out = lookup(torch.cat([others, ids, others]), offsets, None)
        assert out is not None
        expected = vectors.view(B, 3, -1).sum(1)
        torch.testing.assert_close(out, expected.float())
        gradient = torch.randn_like(out)
        out.backward(gradient)
        expected.backward(gradient.double())
        row_map.replace(
            row_map.assignments.flip(0), None, row_map.draw_helper_coefficients(step + 1)
        )  # a re-clustering
        for c, leaf in enumerate(leaves):
            assert leaf.grad is not None
            sums[c] += leaf.grad.square().mean(1)
            scale = torch.ones(2 * k) if optimizer == EmbOptimType.EXACT_SGD else 1 / (sums[c].sqrt() + eps)
            weights[c] -= learning_rate * scale[:, None] * leaf.grad
    for own, weight in zip(tbe.split_embedding_weights(), weights, strict=True):
        torch.testing.assert_close(own, weight.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cce, int16", "hashing_trick"])
def test_threads_change_nothing(name: str) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            collection = collection_of(name)
            out = collection(batch_of(size=700)).values()
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad for parameter in collection.parameters())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_a_large_output_is_that_of_its_parts() -> None:
    collection, features = collection_of("cce, int16"), batch_of(size=6000)  # written past the cache
    generator = torch.Generator().manual_seed(0)
    lengths, ids = features.lengths().view(3, -1), features.values().split(features.length_per_key())
    whole = collection(features).values()
    assert whole.numel() > 2**20
    for bag in torch.randint(0, 6000, (20,), generator=generator).tolist():
        at = [int(lengths[f, :bag].sum()) for f in range(3)]
        mine = [ids[f][at[f] : at[f] + int(lengths[f, bag])] for f in range(3)]
        single = KeyedJaggedTensor(features.keys(), torch.cat(mine), lengths=lengths[:, bag].contiguous())
        torch.testing.assert_close(collection(single).values()[0], whole[bag])


@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_no_and_of_one_example(size: int) -> None:
    collection = collection_of("cce, uint8")
    out = collection(batch_of(size=size)).values()
    assert out.shape == (size, 3 * 64)
    out.sum().backward()


def test_the_operator_follows_a_collection_that_is_copied_pickled_and_loaded() -> None:
    collection, features = collection_of("cce, int16"), batch_of()
    before = collection(features).values()
    for other in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(other(features).values(), 2 * before)
        other.load_state_dict(collection.state_dict())
        assert torch.equal(other(features).values(), before)
    assert torch.equal(collection(features).values(), before)


def left_alone(collection: CompressedEmbeddingBagCollection, features: KeyedJaggedTensor) -> Tensor:
    """What the collection gives where the operator declines."""
    assert collection._fused(features) is None
    return collection(features).values()


def test_what_it_declines_is_as_without_it() -> None:
    half = collection_of("cce, uint8").half()
    with switched_off():
        without = collection_of("cce, uint8")(batch_of()).values()
        off = left_alone(collection_of("cce, uint8"), batch_of())
    torch.testing.assert_close(off, without)
    torch.testing.assert_close(left_alone(half, batch_of()).float(), without, rtol=1e-2, atol=1e-1)
    METHODS["qr"] = (QR(num_remainders=10), 16)
    METHODS["signs"] = (HashingTrick(num_rows=10, sign=True), 16)
    for name in ("qr", "signs"):
        assert left_alone(collection_of(name), batch_of()).shape == (B, 48)
        del METHODS[name]


@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**62)])
def test_ids_out_of_bounds(bad: int) -> None:
    features = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([1, bad, 2]), lengths=torch.ones(3, dtype=torch.int64))
    zero = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([1, 0, 2]), lengths=torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError, match=f"id {bad} is outside"):
        collection_of("cce, uint8")(features)
    ignoring = collection_of("cce, uint8", bounds_check_mode=BoundsCheckMode.IGNORE)
    torch.testing.assert_close(ignoring(features).values(), ignoring(zero).values())
