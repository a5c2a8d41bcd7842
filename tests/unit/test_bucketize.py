"""The native split of rows by rank against TorchRec's own."""

import pytest
import torch
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.native import library
from cce_torchrec.native.bucketize import bucketize

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [[1, 9, 1000], [2**31 - 1, 17, 2**20 + 3]], ids=str)
def test_as_torchrec(num_rows: list[int], num_ranks: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(num_ranks)
    lengths = torch.randint(0, 4, (3, 50), generator=generator)
    values = []
    for rows, count in zip(num_rows, lengths.sum(1).tolist(), strict=True):
        values.append(torch.randint(0, rows, (count,), generator=generator))
        values[-1][-1], values[-1][0] = rows - 1, 0  # the first and the last row of a table
    flat = torch.cat(values)
    weights = torch.rand(len(flat), generator=generator) if weighted else None
    kjt = KeyedJaggedTensor(["a", "b", "c"], flat, weights=weights, lengths=lengths.flatten(), stride=50)
    blocks = torch.tensor([-(-rows // num_ranks) for rows in num_rows])
    expected, _ = bucketize_kjt_before_all2all(kjt, num_ranks, blocks)
    ours = bucketize(kjt, blocks, num_ranks)
    assert ours is not None
    assert ours.keys() == expected.keys()
    assert torch.equal(ours.lengths(), expected.lengths())
    assert torch.equal(ours.values().long(), expected.values())
    assert ours.values().dtype == ours.lengths().dtype == torch.int32
    if weighted:
        assert torch.equal(ours.weights(), expected.weights())


def test_no_rows_at_all() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    ours = bucketize(KeyedJaggedTensor(["a"], empty, lengths=torch.zeros(5, dtype=torch.int64)), torch.tensor([3]), 2)
    assert ours is not None
    assert ours.lengths().tolist() == [0] * 10
    assert ours.keys() == ["a", "a"]
