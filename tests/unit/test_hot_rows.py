"""Hot ids, whose rows are twice the stored one, in the native kernels: against rows that Python makes, an id at a time."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import RowSource
from cce_torchrec.native import library
from cce_torchrec.native.lookup import FusedLookup, LookupTable, Piece
from cce_torchrec.native.rows import Assigned, write_assigned_rows
from cce_torchrec.native.stores import FusedStore

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler on this machine")

V, FIRST, K, HOT, HELPERS = 200, 50, 9, 4, 7  # a column: K main rows, HOT hot ones, HELPERS helper rows


class HotMap:
    """A column's assignment of some ids is hot, of others not."""

    def __init__(self, columns: int, dtype: torch.dtype, hot_from: int | None) -> None:
        generator = torch.Generator().manual_seed(columns)
        self.assignments = torch.randint(0, K + HOT, (V, columns), generator=generator).to(dtype)
        self.coefficients = hash_coefficients(columns, "hot")
        self.hot_from = hot_from

    def source(self) -> RowSource:
        return RowSource(
            num_ids=V,
            first_id=FIRST,
            assignments=self.assignments,
            num_stored=1,
            level_rows=K,
            coefficients=self.coefficients,
            num_hashes=1,
            num_hashed_rows=HELPERS,
            hashed_from=K + HOT,
            hot_from=self.hot_from,
        )

    def rows(self, ids_N: Tensor) -> Tensor:
        """[C, N, 2]"""
        hashes_CN = hash_rows(ids_N, self.coefficients, HELPERS)
        rows_CN2 = torch.empty(*hashes_CN.shape, 2, dtype=torch.int64)
        for c, hashes_N in enumerate(hashes_CN.tolist()):
            for n, (v, helper) in enumerate(zip(ids_N.tolist(), hashes_N, strict=True)):
                main = int(self.assignments[v - FIRST, c])
                is_hot = self.hot_from is not None and main >= self.hot_from
                rows_CN2[c, n] = torch.tensor([main, main if is_hot else K + HOT + helper])
        return rows_CN2


def some_ids(n: int) -> Tensor:
    return torch.randint(FIRST, FIRST + V, (n,), generator=torch.Generator().manual_seed(n))


every_hot_from = pytest.mark.parametrize("hot_from", [K, 0, None])
every_dtype = pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)


@every_hot_from
@every_dtype
@pytest.mark.parametrize(  # spare: rows that no id has, many more than are looked up
    ("columns", "dim", "spare"), [(4, 16, 0), (8, 8, 0), (3, 12, 0), (8, 8, 4000), (3, 12, 4000)]
)
def test_a_step(columns: int, dim: int, spare: int, dtype: torch.dtype, hot_from: int | None) -> None:
    row_map, learning_rate = HotMap(columns, dtype, hot_from), 0.1
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(K + HOT + HELPERS + spare, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * columns,
        optimizer=EmbOptimType.EXACT_SGD, learning_rate=learning_rate,
    )  # fmt: skip
    for weight in tbe.split_embedding_weights():
        torch.nn.init.normal_(weight)
    leaves = [weight.double().requires_grad_() for weight in tbe.split_embedding_weights()]
    pieces = tuple(Piece(c, c, (c * dim,)) for c in range(columns))
    lookup = FusedLookup([LookupTable(row_map, 0, pieces)], 1, columns * dim, FusedStore(tbe))
    ids = some_ids(600)  # two bags of three, then bags of one
    offsets = torch.cat([torch.tensor([0, 3]), torch.arange(6, 601)])
    rows_CN2 = row_map.rows(ids)
    if hot_from == K:
        assert 0 < int((rows_CN2[..., 0] == rows_CN2[..., 1]).sum()) < rows_CN2[..., 0].numel()
    vectors = torch.cat([leaf[rows].sum(1) for leaf, rows in zip(leaves, rows_CN2, strict=True)], dim=1)
    expected = torch.cat([vectors[:3].sum(0, keepdim=True), vectors[3:6].sum(0, keepdim=True), vectors[6:]])
    with torch.no_grad():
        alone = lookup(ids, offsets, None)
    out = lookup(ids, offsets, None)
    assert out is not None
    assert alone is not None
    torch.testing.assert_close(out, expected.float())
    assert torch.equal(out, alone)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(gradient)
    expected.backward(gradient.double())
    for own, leaf in zip(tbe.split_embedding_weights(), leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(own, (leaf.detach() - learning_rate * leaf.grad).float(), rtol=1e-5, atol=1e-5)


@every_hot_from
@every_dtype
@pytest.mark.parametrize("columns", [4, 8, 3])
def test_rows_that_are_written(columns: int, dtype: torch.dtype, hot_from: int | None) -> None:
    row_map, ids = HotMap(columns, dtype, hot_from), some_ids(700)
    assigned = Assigned(
        assignments=row_map.assignments, bits=0, columns=columns, first_id=FIRST, num_ids=V,
        warm_ids=None, coefficients=None, num_values=K + HOT,
    )  # fmt: skip
    values = torch.empty(columns * 2 * len(ids), dtype=torch.int64)
    starts = [c * 2 * len(ids) for c in range(columns)]
    assert write_assigned_rows(
        ids, assigned, row_map.coefficients, HELPERS, values, starts, hashed_from=K + HOT, hot_from=hot_from
    )
    assert torch.equal(values.view(columns, -1, 2), row_map.rows(ids))


def test_a_source_whose_hot_rows_move_is_read_anew() -> None:
    row_map = HotMap(4, torch.int16, None)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(K + HOT + HELPERS, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)] * 4, optimizer=EmbOptimType.EXACT_SGD
    )
    for weight in tbe.split_embedding_weights():
        torch.nn.init.normal_(weight)
    lookup = FusedLookup(
        [LookupTable(row_map, 0, tuple(Piece(c, c, (8 * c,)) for c in range(4)))], 1, 32, FusedStore(tbe)
    )
    ids = some_ids(20)
    for hot_from in (None, K, 0):
        row_map.hot_from = hot_from
        out = lookup(ids, torch.arange(21), None)
        rows_CN2, weights = row_map.rows(ids), tbe.split_embedding_weights()
        expected = torch.cat([weight[rows].sum(1) for weight, rows in zip(weights, rows_CN2, strict=True)], dim=1)
        torch.testing.assert_close(out, expected)
