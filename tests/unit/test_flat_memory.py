"""ROBE and HashedNets against their formulas: Python integers and loops over ids, blocks and dims."""

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cce_torchrec.methods import METHODS, ROBE, DecodeMethod, HashedNet, TableSpec
from cce_torchrec.methods.flat_memory import MAX_CELLS, read_windows
from tests.unit.oracles import python_hash

V, D = 40, 7
IDS = torch.tensor([0, 39, 5, 5, -3, 2**62 + 1, 17])


def spec(dtype: torch.dtype = torch.float32, name: str = "t", **fields) -> TableSpec:
    defaults = {"num_embeddings": V, "embedding_dim": D, "std": 0.25, "device": None}
    return TableSpec(name=name, dtype=dtype, **(defaults | fields))


def expected_cell(number: int, dim: int, method: ROBE | HashedNet) -> tuple[int, int]:
    """The cell that element ``dim`` of an id reads, and its sign."""
    block_size = method.block_size if isinstance(method, ROBE) else 1
    hashed = python_hash(number, 2 * method.num_cells, dim // block_size, method.seed, "t", method.key)
    offset, is_negative = divmod(hashed, 2)
    return (offset + dim % block_size) % method.num_cells, -1 if method.signed and is_negative else 1


def expected_vectors(memory: Tensor, ids: Tensor, method: ROBE | HashedNet) -> Tensor:
    rows = []
    for number in ids.tolist():
        cells = [expected_cell(number, dim, method) for dim in range(D)]
        rows.append(torch.stack([memory[cell] * sign for cell, sign in cells]))
    return torch.stack(rows)


METHODS_TO_TEST: list[ROBE | HashedNet] = [
    *(ROBE(num_cells=11, block_size=size, signed=signed) for size in range(1, D + 1) for signed in (False, True)),
    ROBE(num_cells=D, block_size=D, seed=3),  # one block fills the memory: every offset but 0 wraps around
    ROBE(num_cells=1, block_size=1),
    HashedNet(num_cells=11),
    HashedNet(num_cells=5, signed=False, seed=2),
    HashedNet(num_cells=1),
]
every_method = pytest.mark.parametrize("method", METHODS_TO_TEST, ids=str)


@every_method
def test_vectors_and_gradients_are_those_of_the_formula(method: ROBE | HashedNet) -> None:
    decoder = method.decoder(spec())
    vectors = decoder(IDS)
    reference = decoder.memory.detach().clone().requires_grad_()
    expected = expected_vectors(reference, IDS, method)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0)
    upstream = torch.randn(len(IDS), D)
    vectors.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(decoder.memory.grad, reference.grad)


@pytest.mark.parametrize("size", range(1, D + 1))
def test_blocks_do_wrap_around(size: int) -> None:
    """At 11 cells, some of 40 ids' blocks pass the end, unless they are one cell long."""
    method = ROBE(num_cells=11, block_size=size)
    cells = [[expected_cell(number, dim, method)[0] for dim in range(D)] for number in range(V)]
    assert any(b < a for row in cells for a, b in itertools.pairwise(row[:size])) == (size > 1)


def test_both_signs_occur_equally_often() -> None:
    decoder = HashedNet(num_cells=1).decoder(spec(embedding_dim=16))
    signs = (decoder(torch.arange(1000)) / decoder.memory).detach()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.04  # five standard deviations


@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_float64_gradients_of_windows(width: int) -> None:
    memory = torch.randn(5, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[0, 4], [3, 1], [4, 4]])
    assert gradcheck(lambda m: read_windows(m, offsets, width), memory)
    assert gradgradcheck(lambda m: read_windows(m, offsets, width).square(), memory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is_and_its_gradient_rounded_once(dtype: torch.dtype) -> None:
    decoder = ROBE(num_cells=3, block_size=2).decoder(spec(dtype))
    vectors = decoder(torch.arange(5000))
    assert vectors.dtype == torch.float32
    assert set(vectors.unique().tolist()) == set(decoder.memory.float().tolist())
    vectors.sum().backward()
    method = ROBE(num_cells=3, block_size=2)
    counts = torch.zeros(3)
    for number in range(5000):
        for dim in range(D):
            counts[expected_cell(number, dim, method)[0]] += 1
    torch.testing.assert_close(decoder.memory.grad, counts.to(dtype), rtol=0, atol=0)  # half sums stop at 256 or 2048


@every_method
def test_no_ids(method: ROBE | HashedNet) -> None:
    decoder = method.decoder(spec())
    vectors = decoder(IDS[:0])
    assert vectors.shape == (0, D)
    vectors.sum().backward()
    assert torch.equal(decoder.memory.grad, torch.zeros_like(decoder.memory))


@every_method
def test_meta_then_reset_is_as_built(method: ROBE | HashedNet) -> None:
    torch.manual_seed(1)
    built = method.decoder(spec())
    late = method.decoder(spec(device=torch.device("meta"))).to_empty(device="cpu")
    torch.manual_seed(1)
    late.reset_parameters()
    assert torch.equal(built(IDS), late(IDS))
    assert built.stored_bytes() == built.coefficients.numel() * 8


@pytest.mark.parametrize("method", [ROBE(num_cells=50_000, block_size=4), HashedNet(num_cells=50_000)], ids=str)
def test_elements_start_with_the_std_of_the_table(method: ROBE | HashedNet) -> None:
    torch.manual_seed(0)
    vectors = method.decoder(spec())(torch.arange(20_000)).detach()
    assert float(vectors.std()) == pytest.approx(0.25, rel=0.02)
    assert float(vectors.mean()) == pytest.approx(0, abs=0.01)


def test_names_and_seeds_give_other_hashes() -> None:
    decoders = [
        ROBE(num_cells=1000, block_size=2, seed=seed).decoder(spec(name=name)) for name in "ab" for seed in (0, 1)
    ]
    with torch.no_grad():
        for decoder in decoders:
            decoder.memory.copy_(torch.arange(1000))
    first_cells = {tuple(decoder(torch.arange(5))[:, 0].tolist()) for decoder in decoders}
    assert len(first_cells) == 4


@pytest.mark.parametrize("key", ["robe", "hashed_net"])
@pytest.mark.parametrize("dim", [4, 6, 33, 128])
@pytest.mark.parametrize("num_embeddings", [10, 1000, 10**7])
def test_budgets_are_spent_whole(key: str, num_embeddings: int, dim: int) -> None:
    for share in (0.001, 0.1, 1.0):
        budget = max(1, int(num_embeddings * dim * share))
        method = METHODS[key].from_budget(num_embeddings, dim, budget)
        assert method.num_params(num_embeddings, dim) == min(budget, MAX_CELLS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROBE(num_cells=100, block_size=9).num_params(V, 8), r"block_size=9 .*embedding_dim=8.*works is 8\."),
        (lambda: ROBE(num_cells=100, block_size=9).decoder(spec()), r"block_size=9 .*embedding_dim=7.*works is 7\."),
        (lambda: ROBE(num_cells=3, block_size=4), r"num_cells=3 .*works is 4,"),
        (lambda: ROBE(num_cells=3, block_size=0), "block_size=0 "),
        (lambda: ROBE(num_cells=0, block_size=1), "num_cells=0 "),
        (lambda: HashedNet(num_cells=2**30), rf"num_cells={2**30} is above {2**30 - 1}"),
        (lambda: ROBE.from_budget(V, D, 0), r"smallest possible is 1\."),
        (lambda: ROBE.from_budget(V, D, 4, block_size=5), r"smallest possible is 5\."),
        (lambda: HashedNet.from_budget(V, D, 9, num_cells=10), r"smallest possible is 10\."),
    ],
)
def test_what_cannot_work_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make()


def test_memories_are_of_decode_methods() -> None:
    assert all(issubclass(METHODS[key], DecodeMethod) for key in ("robe", "hashed_net"))


@pytest.mark.parametrize(("dim", "size"), [(1, 1), (3, 3), (7, 4), (16, 4), (32, 4), (33, 8), (128, 16)])
def test_a_budget_takes_up_to_eight_blocks_of_a_multiple_of_four(dim: int, size: int) -> None:
    assert ROBE.from_budget(V, dim, 1000) == ROBE(num_cells=1000, block_size=size)
    assert ROBE.from_budget(V, dim, 2).block_size == min(size, 2)  # no wider than the memory
