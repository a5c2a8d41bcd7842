"""Triton's lookups, in its interpreter, against sums of dense rows in float64, and their autograd."""

import copy
import logging
import pickle
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, get_sharders
from cce_torchrec.gpu import Lookup, dispatch, takes
from cce_torchrec.hashing import MAX_ROWS, hash_coefficients, hash_rows
from cce_torchrec.methods import CCE, CE, PQ, QR, Bloom, FullTable, HashingTrick, ResidualCCE
from cce_torchrec.methods.base import RowMap, RowMethod
from cce_torchrec.native.lookup import LookupTable, Piece
from cce_torchrec.native.stores import ParameterStore
from cce_torchrec.rewrite import RowRewriter
from tests.gpu.conftest import Run
from tests.unit.oracles import python_hash

V, B = 300, 20
METHODS: dict[str, tuple[RowMethod, int]] = {  # and the dims of a vector
    "cce, c=1, uint8, width 64": (CCE(num_rows=9, num_columns=1), 64),
    "cce, c=4, int16, width 4": (CCE(num_rows=257, num_columns=4, num_helper_rows=7), 16),
    "cce, c=4, int32, width 16": (CCE(num_rows=2**15 + 1, num_columns=4, num_helper_rows=3), 64),
    "cce, c=8, uint8, width 8": (CCE(num_rows=20, num_columns=8), 64),
    "cce, c=3, width 12": (CCE(num_rows=9, num_columns=3), 36),
    "cce, c=4, width 5": (CCE(num_rows=9, num_columns=4), 20),
    "cce, c=4, uint8, hot ids": (CCE(num_rows=9, num_columns=4, num_hot_ids=40), 16),
    "cce, c=2, int16, hot ids": (CCE(num_rows=250, num_columns=2, num_helper_rows=5, num_hot_ids=90), 24),
    "residual_cce, 4 levels": (ResidualCCE(num_rows=9, num_columns=4, num_levels=4), 32),
    "pq, no helper": (PQ(num_rows=9, num_columns=8), 64),
    "ce": (CE(num_rows=9, num_columns=4), 16),
    "bloom, 3 hashes": (Bloom(num_rows=30, num_hashes=3), 8),
    "hashing_trick": (HashingTrick(num_rows=30), 16),
    "full": (FullTable(), 12),
}


def batch_of(num_features: int, dtype: torch.dtype = torch.int64, size: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, offsets and weights of bags of 0 to 3 ids, and one of 9."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(0, 4, (num_features * size,), generator=generator)
    lengths[num_features * size // 2] = 9
    ids = torch.randint(0, V, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return ids.to(dtype), offsets.to(dtype), torch.rand(len(ids), generator=generator)


def table_of(method: RowMethod, dim: int) -> tuple[RowMap, list[nn.EmbeddingBag]]:
    row_map = method.row_map("t", V, dim, None)
    return row_map, [nn.EmbeddingBag(*column, mode="sum") for column in row_map.columns]


def lookup_of(row_map: RowMap, bags: list[nn.EmbeddingBag], dim: int, features: int, first: int, total: int) -> Lookup:
    """Of a table whose columns are side by side, one feature after the other."""
    starts = [sum(column.dim for column in row_map.columns[:i]) for i in range(len(bags))]
    outs = [tuple(f * dim + start for f in range(features)) for start in starts]
    pieces = tuple(Piece(i, i, places) for i, places in enumerate(outs))
    table = LookupTable(row_map, first, pieces)
    return Lookup([table], total, features * dim, ParameterStore(bags), BoundsCheckMode.FATAL)


def dense(row_map: RowMap, leaves: list[Tensor], ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Bags of dense vectors, in float64; ``leaves``: the codebooks."""
    parts = [leaf[rows].sum(1) for leaf, rows in zip(leaves, row_map.rows(ids.long()), strict=True)]
    vectors_ND = torch.cat(parts, dim=1)
    if weights is not None:
        vectors_ND = vectors_ND * weights.double()[:, None]
    rows = torch.arange(len(ids))
    return embedding_bag(rows, vectors_ND, offsets.long(), mode="sum", include_last_offset=True)


def check_vectors_and_gradients(name: str, is_weighted: bool, dtype: torch.dtype, size: int) -> None:
    method, dim = METHODS[name]
    row_map, bags = table_of(method, dim)
    lookup = lookup_of(row_map, bags, dim, features=2, first=1, total=4)  # other features before and after
    ids, offsets, weights = batch_of(4, dtype, size)
    ids[: int(offsets[size])] = -1  # which it must not take notice of
    ids[int(offsets[3 * size]) :] = V
    out = lookup(ids, offsets, weights if is_weighted else None)
    leaves = [bag.weight.detach().double().requires_grad_() for bag in bags]
    own, ends = slice(int(offsets[size]), int(offsets[3 * size])), offsets[size : 3 * size + 1] - offsets[size]
    mine = dense(row_map, leaves, ids[own], ends, weights[own] if is_weighted else None)
    expected = mine.view(2, size, dim).transpose(0, 1).reshape(size, 2 * dim)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    out.backward(gradient)
    expected.backward(gradient.double())
    for bag, leaf in zip(bags, leaves, strict=True):
        torch.testing.assert_close(bag.weight.grad, leaf.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("is_weighted", "dtype"), [(False, torch.int64), (True, torch.int32)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_vectors_and_gradients(interpreter: Run, name: str, is_weighted: bool, dtype: torch.dtype) -> None:
    interpreter(check_vectors_and_gradients, name, is_weighted, dtype, B)


@pytest.mark.parametrize("size", [1, 257, 600])
def test_batches_of_one_and_of_several_blocks(interpreter: Run, size: int) -> None:
    interpreter(check_vectors_and_gradients, "hashing_trick", False, torch.int64, size)


def check_hashes(num_rows: int) -> None:
    from tests.gpu.hash_kernel import hash_kernel

    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    ids[:8] = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**31, -(2**31), 2**32 - 1])
    coefficients = hash_coefficients(5, "seed", num_rows)
    expected = hash_rows(ids, coefficients, num_rows)
    for h in range(5):
        job = torch.tensor([0, 0, coefficients.data_ptr(), 0, 0, 0, -1, 0, 1, num_rows, 0, 0, 0, 0])
        out = torch.empty(len(ids), dtype=torch.int64)
        hash_kernel[(1,)](job, ids, out, N=len(ids), h=h)
        assert torch.equal(out, expected[h])
        assert out.tolist() == [python_hash(number, num_rows, h, "seed", num_rows) for number in ids.tolist()]


@pytest.mark.parametrize("num_rows", [1, 2, 1000, 2**31 - 2, MAX_ROWS])
def test_hashes_are_those_of_hashing(interpreter: Run, num_rows: int) -> None:
    interpreter(check_hashes, num_rows)


def collection_of(**options: Any) -> CompressedEmbeddingBagCollection:
    """Tables of two methods, of two features and of one; the second pools by MEAN."""
    torch.manual_seed(0)
    tables = [
        CompressedEmbeddingBagConfig(
            name=table, num_embeddings=V, embedding_dim=16, feature_names=features, pooling=pooling, method=method,
        )
        for table, features, pooling, method in (
            ("t", ["a", "b"], PoolingType.SUM, CCE(num_rows=20, num_columns=4)),
            ("u", ["c"], PoolingType.MEAN, Bloom(num_rows=30, num_hashes=2)),
        )
    ]  # fmt: skip
    return CompressedEmbeddingBagCollection(tables, **options)


def features_of(size: int = B) -> KeyedJaggedTensor:
    ids, offsets, weights = batch_of(3, size=max(size, 1))
    lengths = offsets.diff()[: 3 * size]
    count = int(lengths.sum())
    return KeyedJaggedTensor(["c", "a", "b"], ids[:count], lengths=lengths, weights=weights[:count])


def declines(*_: object) -> None:
    raise AssertionError("left to the rewrite")


def check_collection(is_weighted: bool) -> None:
    collection, features = collection_of(is_weighted=is_weighted), features_of()
    with patch.object(RowRewriter, "__call__", declines):
        out = collection(features)
    for key in ("a", "b", "c"):
        weight = collection.dense_weight("u" if key == "c" else "t").double()
        weights = features[key].to_dense_weights() if is_weighted else [None] * B
        for vector, bag, sample in zip(out[key], features[key].to_dense(), weights, strict=True):
            vectors = weight[bag] if sample is None else weight[bag] * sample.double()[:, None]
            total = vectors.sum(0) / (max(len(bag), 1) if key == "c" else 1)
            torch.testing.assert_close(vector.double(), total, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(other(features).values(), 2 * out.values())
    assert collection(features_of(0)).values().shape == (0, 48)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_collection_is_looked_up_by_the_kernels(interpreter: Run, is_weighted: bool) -> None:
    interpreter(check_collection, is_weighted)


def check_bounds(bad: int) -> None:
    def one_of_each(number: int) -> KeyedJaggedTensor:
        ids = torch.tensor([1, number, 2])
        return KeyedJaggedTensor(["a", "b", "c"], ids, lengths=torch.ones(3, dtype=torch.int64))

    with pytest.raises(RuntimeError, match="Expected Tensor with single nonzero value"):
        collection_of()(one_of_each(bad))
    ignoring = collection_of(bounds_check_mode=BoundsCheckMode.IGNORE)
    assert torch.equal(ignoring(one_of_each(bad)).values(), ignoring(one_of_each(0)).values())


@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**62)])
def test_ids_out_of_bounds(interpreter: Run, bad: int) -> None:
    interpreter(check_bounds, bad)


def check_replaced() -> None:
    collection, features = collection_of(), features_of()
    row_map = collection.lowered_tables[0].row_map
    collection(features).values().sum().backward()
    out = collection(features).values()
    row_map.assignments.copy_(row_map.assignments.flip(0))
    dense_VD = collection.dense_weight("t")
    pooled = torch.stack([dense_VD[bag].sum(0) for bag in features["a"].to_dense()])
    torch.testing.assert_close(collection(features)["a"], pooled)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_assignments_that_are_replaced(interpreter: Run) -> None:
    interpreter(check_replaced)


def check_declined() -> None:
    features = features_of()
    torch.use_deterministic_algorithms(True)
    try:
        assert collection_of()._fused(features) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert collection_of()._fused(features) is not None
    assert collection_of().half()._fused(features) is None
    qr = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=16, feature_names=["a"], method=QR(num_remainders=10)
    )
    assert CompressedEmbeddingBagCollection([qr])._fused(features) is None


def test_what_is_declined(interpreter: Run) -> None:
    interpreter(check_declined)


def check_data_parallel() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, features = collection_of(), features_of()
        sharder = next(s for s in get_sharders() if s.module_type is CompressedEmbeddingBagCollection)
        names = [name for table in plain.lowered_tables for name in table.physical_names]
        plan = construct_module_sharding_plan(
            plain, {name: data_parallel() for name in names}, local_size=1, world_size=1, device_type="cpu",
            sharder=sharder,
        )  # fmt: skip
        sharded = DistributedModelParallel(
            collection_of(), device=torch.device("cpu"), plan=ShardingPlan(plan={"": plan}), sharders=[sharder]
        )
        sharded.load_state_dict(plain.state_dict())
        with patch.object(RowRewriter, "__call__", declines):
            out = dict(sharded(features).wait().to_dict())
        expected = plain(features)
        for key in ("a", "b", "c"):
            torch.testing.assert_close(out[key], expected[key])
        torch.cat([out[key] for key in expected.keys()], dim=1).square().sum().backward()  # noqa: SIM118
        expected.values().square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
    finally:
        dist.destroy_process_group()


def test_data_parallel_tables_of_a_sharded_collection(interpreter: Run) -> None:
    interpreter(check_data_parallel)


def test_they_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert not takes(torch.zeros(1))
    monkeypatch.setenv(dispatch.SWITCH, "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch._device_type.cache_clear()
    with caplog.at_level(logging.WARNING, logger=dispatch.__name__):
        assert not takes(torch.zeros(1))
    assert "Triton cannot be imported" in caplog.text
    monkeypatch.undo()
    dispatch._device_type.cache_clear()
