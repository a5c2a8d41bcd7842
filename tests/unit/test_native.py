"""The native kernels give what PyTorch gives, and doing without them harms nothing."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import CompressedEmbeddingBagConfig
from cce_torchrec.lowering import lower_tables
from cce_torchrec.methods import CCE, CE, QR, HashingTrick
from cce_torchrec.methods.base import RowMap, RowMethod
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.native import build, library, switched_off
from cce_torchrec.native.nearest import NativeSearch, add_moments
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import Tracker, assign_nearest, score_rounding, squared_distances
from cce_torchrec.rewrite import RowRewriter
from tests.unit.test_kmeans import NEAREST_CASES, brute_force

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory in which nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    library.cache_clear()


# Rows ------------------------------------------------------------------------------------------------------------------

V = 1000
METHODS: dict[str, RowMethod | None] = {
    "uint8": CCE(num_rows=256, num_columns=4),
    "int16": CCE(num_rows=257, num_columns=8, num_helper_rows=5),
    "int32": CCE(num_rows=2**15 + 1, num_columns=2),
    "one column": CCE(num_rows=7, num_columns=1),
    "many columns": CCE(num_rows=300, num_columns=16, num_helper_rows=1),
    "packed": CCE(num_rows=1000, num_columns=4, bit_packed=True),
    "packed, one bit": CCE(num_rows=2, num_columns=16, bit_packed=True),
    "packed, 31 bits": CCE(num_rows=2**31 - 1, num_columns=4, num_helper_rows=5, bit_packed=True),
    "warm": CCE(num_rows=300, num_columns=8, num_assigned_ids=400),
    "one warm": CCE(num_rows=7, num_columns=4, num_assigned_ids=1),
    "warm and packed": CCE(num_rows=300, num_columns=4, bit_packed=True, num_assigned_ids=V - 1),
    "hot": CCE(num_rows=250, num_columns=8, num_helper_rows=5, num_hot_ids=30),
    "hot, warm and packed": CCE(num_rows=250, num_columns=4, num_hot_ids=30, bit_packed=True, num_assigned_ids=90),
    "ce": CE(num_rows=2**31 - 1, num_columns=4),
    "hashing trick": HashingTrick(num_rows=10),
    "no kernel": QR(num_remainders=10),
    "full": None,
}


def table(name: str, method: RowMethod | None, features: int = 1) -> EmbeddingBagConfig:
    size = {"num_embeddings": V, "embedding_dim": 64, "feature_names": [f"{name}/{f}" for f in range(features)]}
    if method is None:
        return EmbeddingBagConfig(name=name, **size)
    return CompressedEmbeddingBagConfig(name=name, method=method, **size)


def batch(configs: list[EmbeddingBagConfig], batch_size: int, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    keys = [feature for config in configs for feature in config.feature_names]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, (len(keys) * batch_size,), generator=generator)
    ids = torch.randint(V, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys, ids.to(dtype), lengths=lengths, weights=torch.rand(len(ids)))


def warm_up(row_map: RowMap) -> None:
    """Give the slots of a row map to some ids, and anything to those ids."""
    if isinstance(row_map, CCERowMap) and row_map.warm_ids is not None:
        ids = torch.randperm(V)[: len(row_map.warm_ids) - len(row_map.warm_ids) // 9].sort().values
        shape = (len(ids), row_map.assignments_per_id)
        row_map.put(row_map.encoding.encode(torch.randint(row_map.num_values, shape)), ids)


def rewriter(
    configs: list[EmbeddingBagConfig], share: slice = slice(None), repeated: int = 0, **options: BoundsCheckMode
) -> RowRewriter:
    lowered = lower_tables(configs, [None] * len(configs))
    for one in lowered:
        warm_up(one.row_map)
    names = [name for one in lowered for name in one.physical_names][share]
    return RowRewriter(lowered, names + names[:repeated], True, options.get("mode", BoundsCheckMode.FATAL))


@needs_compiler
@pytest.mark.parametrize(
    "share", [slice(None), slice(1, None, 2), slice(None, None, -1)], ids=["all", "odd", "reversed"]
)
@pytest.mark.parametrize("batch_size", [0, 1, 600])
def test_a_rewrite_is_that_of_pytorch(batch_size: int, share: slice) -> None:
    configs = [table(name, method, features=1 + index % 2) for index, (name, method) in enumerate(METHODS.items())]
    rewrite, features = rewriter(configs, share, repeated=2), batch(configs, batch_size)  # as column-wise shards are
    assert library() is not None
    native = rewrite(features)
    with switched_off():
        plain = rewrite(features)
    assert native.keys() == plain.keys()
    assert native.values().dtype == torch.int64
    assert torch.equal(native.values(), plain.values())
    assert torch.equal(native.lengths(), plain.lengths())
    assert torch.equal(native.weights(), plain.weights())


@needs_compiler
@pytest.mark.parametrize(
    "name",
    ["uint8", "int16", "int32", "many columns", "packed", "packed, one bit", "packed, 31 bits", "ce", "hashing trick"],
)
@pytest.mark.parametrize("N", [0, 1, 511, 512, 513, 3000])
def test_kernels_write_what_rows_returns_and_nothing_else(name: str, N: int) -> None:
    row_map = lower_tables([table("t", METHODS[name])], [None])[0].row_map
    if not row_map.bounded:
        ids = torch.randint(-(2**62), 2**62, (N,)).repeat_interleave(2)[::2]  # not contiguous
    else:
        row_map.keep_block(300, 800, torch.device("cpu"))
        ids = torch.randint(300, 800, (N,)).to(torch.int32)
    size, C = N * row_map.rows_per_id, len(row_map.columns)
    values = torch.full((C * size + C,), -1)
    starts = [None if c == 1 else c * (size + 1) for c in range(C)]
    assert row_map.write_rows(ids, values, starts)
    expected = torch.full_like(values, -1)
    for start, rows_NR in zip(starts, row_map.rows(ids), strict=True):
        if start is not None:
            expected[start : start + size] = rows_NR.flatten()
    assert torch.equal(values, expected)


@needs_compiler
@pytest.mark.parametrize("num_warm", [1, 2, 3, 17, 100, 999, V])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_learned", [False, True])
def test_a_kernel_finds_the_ids_that_are_warm(num_warm: int, ids_dtype: torch.dtype, is_learned: bool) -> None:
    row_map = lower_tables([table("t", CCE(num_rows=300, num_columns=4, num_assigned_ids=num_warm))], [None])[0].row_map
    assert isinstance(row_map, CCERowMap)
    row_map.warm_ids = row_map.warm_ids.to(ids_dtype)
    warm = torch.randperm(V)[:num_warm].sort().values
    assignments = torch.randint(300, (num_warm, 4))
    row_map.put(row_map.encoding.encode(assignments), warm)
    if is_learned:
        row_map.share_cold_row()
    ids = torch.randint(V, (3001,))
    values = torch.empty(4 * 2 * len(ids), dtype=torch.int64)
    assert row_map.write_rows(ids, values, [c * 2 * len(ids) for c in range(4)])
    found = dict(zip(warm.tolist(), assignments.tolist(), strict=True))
    cold = [[0] * 4] * len(ids) if is_learned else row_map.cold(ids).T.tolist()
    expected = [found.get(v, h) for v, h in zip(ids.tolist(), cold, strict=True)]
    assert values.view(4, len(ids), 2)[..., 0].T.tolist() == expected


@needs_compiler
@pytest.mark.parametrize("bad", [-1, V, 2**62, -(2**62)])
@pytest.mark.parametrize("name", ["uint8", "packed"])
def test_ids_out_of_bounds_take_the_usual_way(name: str, bad: int) -> None:
    configs = [table(name, METHODS[name])]
    ids = torch.tensor([3, bad, 5])
    features = KeyedJaggedTensor([f"{name}/0"], ids, lengths=torch.ones(3, dtype=torch.int64), weights=torch.ones(3))
    with pytest.raises(IndexError, match=rf"id {bad} is outside"):
        rewriter(configs)(features)
    warned = rewriter(configs, mode=BoundsCheckMode.IGNORE)(features).values().view(4, 3, 2)
    zero = rewriter(configs)(
        KeyedJaggedTensor([f"{name}/0"], ids * 0, lengths=features.lengths(), weights=features.weights())
    )
    assert torch.equal(warned[:, 1], zero.values().view(4, 3, 2)[:, 1])
    with pytest.raises((IndexError, RuntimeError)):  # nobody checks, yet nothing is read out of bounds
        rewriter(configs, mode=BoundsCheckMode.NONE)(features)


# Nearest centroids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEAREST_CASES)
def test_nearest_in_pytorch_is_that_of_brute_force_too(name: str) -> None:
    points, centroids = NEAREST_CASES[name]
    with switched_off():
        assignment, distance = assign_nearest(points, centroids)
    expected_assignment, expected_distance = brute_force(points, centroids)
    assert torch.equal(assignment, expected_assignment)
    torch.testing.assert_close(distance.double(), expected_distance, rtol=1e-5, atol=0)


def tracked(points: Tensor, centroids: Tensor) -> NativeSearch:
    search = NativeSearch.build(points, len(centroids), rounding=score_rounding(points.dtype, points.shape[1]))
    assert search is not None
    return search


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("K", "D"), [(1, 3), (16, 4), (37, 1), (300, 16), (513, 8), (1100, 5)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_bounds_hold_while_centroids_move(K: int, D: int, threads: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(K)
    points = torch.randn(5000, D, generator=generator) + offset
    centroids = torch.randn(K, D, generator=generator) + offset
    search = tracked(points, centroids)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in (0.0, 0.02, 0.0, 0.3, 1e-6, 0.05, 0.01):
            centroids = centroids + step * torch.randn(K, D, generator=generator)
            if step == 0.05:  # as when a centroid without points is moved, onto another one
                centroids[K // 2] = centroids[0]
            assignment, distance = search.nearest(centroids)
            exact = squared_distances(points, centroids)
            assert torch.equal(assignment, exact.argmin(dim=1))
            torch.testing.assert_close(distance.double(), exact.amin(dim=1), rtol=1e-5, atol=0)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("max_groups", [1, 3])
def test_groups_of_several_vectors(max_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cce_torchrec.native.nearest.MAX_GROUPS", max_groups)
    points, centroids = torch.randn(2000, 6), torch.randn(200, 6)
    search = tracked(points, centroids)
    for _ in range(4):
        assert torch.equal(search.nearest(centroids)[0], squared_distances(points, centroids).argmin(dim=1))
        centroids = centroids + 0.05 * torch.randn(200, 6)


@needs_compiler
def test_points_that_are_not_numbers_do_no_harm() -> None:
    points = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [1.0, 1.0]])
    assignment, _ = assign_nearest(points, torch.eye(2) + 1)
    assert assignment.tolist()[2] == 0
    assert all(0 <= k < 2 for k in assignment.tolist())


@needs_compiler
def test_a_fit_is_that_of_pytorch() -> None:
    points = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    start = points[:150].clone()

    def fit() -> tuple[Tensor, float]:
        result = kmeans(
            points,
            150,
            seed=0,
            point_ids_N=torch.arange(20_000),
            weights_N=weights,
            tolerance=0.0,
            initial_centroids_KD=start,
        )
        assert result.iterations == 25
        return result.centroids_KD, result.objective

    assert Tracker(points, 150, None)._native is not None
    native, objective = fit()
    with switched_off():
        assert Tracker(points, 150, None)._native is None
        plain, expected = fit()
    torch.testing.assert_close(native, plain, rtol=0, atol=1e-5)
    assert objective == pytest.approx(expected, rel=1e-7)


@needs_compiler
def test_moments_are_sums_of_weighted_points() -> None:
    points, weights, assignment = torch.randn(50, 3), torch.rand(50, dtype=torch.float64), torch.randint(4, (50,))
    moments = torch.ones(4, 4, dtype=torch.float64)
    assert add_moments(points, weights, assignment, moments)
    one_hot = torch.nn.functional.one_hot(assignment, 4).double() * weights[:, None]
    expected = 1 + one_hot.T @ torch.cat([points.double(), torch.ones(50, 1)], dim=1)
    torch.testing.assert_close(moments, expected)
    assert not add_moments(points.double(), weights, assignment, moments)


# Having no library -----------------------------------------------------------------------------------------------------


def is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """Whether all works without the library, and says so once at most, at level INFO."""
    configs = [table("uint8", METHODS["uint8"]), table("ce", METHODS["ce"])]
    with caplog.at_level(logging.INFO, logger="cce_torchrec.native"):
        assert library() is None
        assert len(rewriter(configs)(batch(configs, 5)).values()) > 0
        assert assign_nearest(torch.ones(3, 2), torch.eye(2))[0].tolist() == [0, 0, 0]
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def test_switched_off(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with switched_off():
        is_harmless(caplog)
    assert not caplog.records
    assert not any(empty_cache.iterdir())


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    is_harmless(caplog)
    assert [record.message for record in caplog.records if "No C++ compiler" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("command", ["/bin/false", "/bin/true", "/bin/sh -c 'echo broken >&2; exit 3'"])
def test_a_broken_compiler(
    command: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", command)
    is_harmless(caplog)
    assert not list(empty_cache.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"not a library", None], ids=["emptied", "other", "cut"])
def test_a_damaged_file_is_made_again(damage: bytes | None, empty_cache: Path) -> None:
    assert library() is not None
    (made,) = empty_cache.rglob("*.so")
    whole = made.read_bytes()
    made.unlink()  # the one that is loaded stays as it is
    made.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    library.cache_clear()
    assert library() is not None
    assert build._is_whole(made)


@needs_compiler
def test_a_cache_that_cannot_be_written_to(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = empty_cache / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    assert library() is not None


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together(empty_cache: Path) -> None:
    code = "from cce_torchrec.native import library; assert library() is not None"
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [subprocess.Popen(command, env=os.environ.copy()) for _ in range(2)]
    assert [process.wait(timeout=150) for process in processes] == [0, 0]
    made = list((empty_cache / "cce_torchrec").iterdir())
    assert len(made) == 1
    assert build._is_whole(made[0])
