"""Native lookups against ``embedding_bag`` in float64, row-wise Adagrad as its formula, and FBGEMM's own kernels."""

import resource
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.nn.functional import embedding_bag

from cce_torchrec.native import library
from cce_torchrec.native.rows_lookup import use_native_lookups

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler on this machine")

LEARNING_RATE, EPS = 0.3, 1e-3
FEATURES = [0, 0, 1, 2, 3]  # the table of each: the first table has two
DIMS = [[8, 8, 8, 8], [4, 16, 32, 64], [12, 20, 128, 4]]
SMALL = [7, 30, 1, 5]  # rows of each table; a batch looks up about 120 in the first, 60 in each other
LARGE = [4000, 230, 1, 7000]
every_size = pytest.mark.parametrize("rows", [SMALL, LARGE], ids=["small", "large"])


def fused(
    dims: list[int], rows: list[int] = SMALL, optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
) -> torch.nn.Module:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(n, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for n, dim in zip(rows, dims, strict=True)],
        feature_table_map=FEATURES,
        optimizer=optimizer,
        learning_rate=LEARNING_RATE,
        eps=EPS,
    )
    for number, weight in enumerate(tbe.split_embedding_weights()):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return tbe


def bags(tbe: torch.nn.Module, seed: int, size: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, offsets and weights of bags of 0 to 3; low rows are looked up more often."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), size), generator=generator)
    rows = [len(weight) for weight in tbe.split_embedding_weights()]
    indices = [
        (torch.rand(int(lengths[f].sum()), generator=generator) ** 4 * rows[table]).long()
        for f, table in enumerate(FEATURES)
    ]
    flat = torch.cat(indices)
    return (
        flat,
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)]),
        torch.rand(len(flat), generator=generator),
    )


def pooled(weights: list[Tensor], batch: tuple[Tensor, Tensor, Tensor], weighted: bool) -> Tensor:
    """[B, W] by PyTorch's own function, a feature at a time."""
    indices, offsets, sample_weights = batch
    size = (len(offsets) - 1) // len(FEATURES)
    parts = []
    for f, table in enumerate(FEATURES):
        ends = offsets[f * size : (f + 1) * size + 1]
        at = slice(int(ends[0]), int(ends[-1]))
        sample = sample_weights[at].to(weights[table].dtype) if weighted else None
        parts.append(
            embedding_bag(
                indices[at],
                weights[table],
                ends - ends[0],
                mode="sum",
                per_sample_weights=sample,
                include_last_offset=True,
            )
        )
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@every_size
def test_three_steps_of_rowwise_adagrad(rows: list[int], dims: list[int], weighted: bool) -> None:
    tbe = fused(dims, rows)
    assert use_native_lookups(tbe) == 1
    tbe.forward._fallback = None  # nothing may be left to FBGEMM
    weights = [weight.double() for weight in tbe.split_embedding_weights()]
    sums = [torch.zeros(len(weight), dtype=torch.float64) for weight in weights]
    for step in range(3):
        batch = bags(tbe, step)
        leaves = [weight.clone().requires_grad_() for weight in weights]
        expected = pooled(leaves, batch, weighted)
        out = tbe(batch[0], batch[1], batch[2] if weighted else None)
        torch.testing.assert_close(out, expected.float())
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(step))
        out.backward(gradient)
        expected.backward(gradient.double())
        for leaf, weight, total in zip(leaves, weights, sums, strict=True):
            assert leaf.grad is not None
            total += leaf.grad.square().mean(1)
            weight -= LEARNING_RATE * leaf.grad / (total.sqrt() + EPS).unsqueeze(1)
        for ours, weight in zip(tbe.split_embedding_weights(), weights, strict=True):
            torch.testing.assert_close(ours, weight.float(), rtol=1e-5, atol=1e-5)
        for (momentum,), total in zip(tbe.split_optimizer_states(), sums, strict=True):
            torch.testing.assert_close(momentum, total.float(), rtol=1e-5, atol=1e-6)


@every_size
def test_sgd_with_a_scheduled_learning_rate(rows: list[int]) -> None:
    tbe = fused(DIMS[0], rows, EmbOptimType.EXACT_SGD)
    assert use_native_lookups(tbe) == 1
    tbe.set_learning_rate(0.05)
    leaves = [weight.double().requires_grad_() for weight in tbe.split_embedding_weights()]
    batch = bags(tbe, 0)
    pooled(leaves, batch, False).sum().backward()
    tbe(*batch[:2]).sum().backward()
    for ours, leaf in zip(tbe.split_embedding_weights(), leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(ours, (leaf.detach() - 0.05 * leaf.grad).float(), rtol=1e-5, atol=1e-5)


def test_a_dense_gradient() -> None:
    tbe = DenseTableBatchedEmbeddingBagsCodegen([(7, 8), (30, 8), (1, 8), (5, 8)], FEATURES, use_cpu=True)
    assert use_native_lookups(tbe) == 1
    tbe.forward._fallback = None
    leaves = [weight.double().requires_grad_() for weight in tbe.split_embedding_weights()]
    batch = bags(tbe, 0)
    expected, out = pooled(leaves, batch, False), tbe(*batch[:2])
    torch.testing.assert_close(out, expected.float())
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient.double())
    assert tbe.weights.grad is not None
    whole = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
    torch.testing.assert_close(tbe.weights.grad, whole.float(), rtol=1e-5, atol=1e-5)


@every_size
def test_threads_change_nothing(rows: list[int]) -> None:
    one, two = fused(DIMS[1], rows), fused(DIMS[1], rows)
    for tbe in (one, two):
        use_native_lookups(tbe)
    batch, threads = bags(one, 0), torch.get_num_threads()
    try:
        for tbe, count in ((one, 1), (two, 3)):
            torch.set_num_threads(count)
            tbe(*batch[:2]).square().sum().backward()
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(one.split_embedding_weights(), two.split_embedding_weights(), strict=True):
        assert torch.equal(left, right)


def test_indices_out_of_bounds_are_left_to_fbgemm() -> None:
    ours, theirs = fused(DIMS[0]), fused(DIMS[0])
    use_native_lookups(ours)
    indices, offsets, _ = bags(ours, 0)
    indices[0] = 10**12
    assert torch.equal(ours(indices.clone(), offsets), theirs(indices.clone(), offsets))


def test_batches_of_all_sizes_as_fbgemm() -> None:
    ours, theirs = fused(DIMS[1], LARGE), fused(DIMS[1], LARGE)
    use_native_lookups(ours)
    ours.forward._fallback = None
    for step, size in enumerate([40, 0, 1, 2000, 40, 5, 0, 300]):  # so that sums are of few rows, of all, of few again
        indices, offsets, weights = bags(ours, step, size)
        outs = [tbe(indices, offsets, weights) for tbe in (ours, theirs)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
        gradient = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(step))
        for out in outs:
            out.backward(gradient)
        for own, other in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
        for (own,), (other,) in zip(ours.split_optimizer_states(), theirs.split_optimizer_states(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@every_size
def test_bags_without_ids_change_nothing(rows: list[int]) -> None:
    tbe = fused(DIMS[0], rows)
    use_native_lookups(tbe)
    tbe.forward._fallback = None
    before = [weight.clone() for weight in tbe.split_embedding_weights()]
    out = tbe(torch.empty(0, dtype=torch.int64), torch.zeros(len(FEATURES) * 40 + 1, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(40, 8 * len(FEATURES)))
    out.sum().backward()
    assert all(torch.equal(*pair) for pair in zip(tbe.split_embedding_weights(), before, strict=True))
    assert not any(momentum.any() for (momentum,) in tbe.split_optimizer_states())


@every_size
def test_two_backwards_of_one_forward_are_two_steps(rows: list[int]) -> None:
    ours, theirs = fused(DIMS[0], rows), fused(DIMS[0], rows)
    use_native_lookups(ours)
    for tbe in (ours, theirs):
        out = tbe(*bags(tbe, 0)[:2])
        out.backward(torch.ones_like(out), retain_graph=True)
        out.backward(torch.ones_like(out))
    for own, other in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_a_step_keeps_no_memory_for_rows_that_are_not_looked_up() -> None:
    tbe = fused([4, 4, 4, 64], [1, 1, 1, 2**18])  # 64 MiB
    use_native_lookups(tbe)
    out = tbe(*bags(tbe, 0)[:2])
    before = resident_bytes()
    out.sum().backward()
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    """Of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_other_optimizers_are_left_alone() -> None:
    assert use_native_lookups(fused(DIMS[0], optimizer=EmbOptimType.EXACT_ADAGRAD)) == 0
