"""K-means against naive float64 oracles, and the promise that neither split nor order of the points matters."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cce_torchrec.recluster import kmeans as fitting
from cce_torchrec.recluster import seeding
from cce_torchrec.recluster.collectives import Collectives, LocalCollectives
from cce_torchrec.recluster.kmeans import KMeansResult, kmeans
from cce_torchrec.recluster.nearest import Search, assign_nearest
from cce_torchrec.recluster.seeding import Share, draw
from cce_torchrec.recluster.together import Steps, run_together
from tests.unit.thread_ranks import on_threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The problems here are small: on a busy machine, waiting for a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- oracles ---------------------------------------------------------------------------------------------------------


def brute_force(points_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index among equals) from float64 differences, one point at a time."""
    assignment, distance = [], []
    for point in points_ND.double():
        squares = ((centroids_KD.double() - point) ** 2).sum(dim=1).tolist()
        assignment.append(squares.index(min(squares)))
        distance.append(min(squares))
    return torch.tensor(assignment, dtype=torch.int64), torch.tensor(distance, dtype=torch.float64)


def naive_lloyd(points_ND: Tensor, weights_N: Tensor, centroids_KD: Tensor, num_iterations: int) -> Tensor:
    """Textbook Lloyd in float64; centroids without points stay."""
    points, centroids = points_ND.double(), centroids_KD.double().clone()
    for _ in range(num_iterations):
        nearest = ((points[:, None] - centroids[None]) ** 2).sum(dim=2).argmin(dim=1)
        for k in range(len(centroids)):
            mine = nearest == k
            if weights_N[mine].sum() > 0:
                centroids[k] = (points[mine] * weights_N[mine, None]).sum(dim=0) / weights_N[mine].sum()
    return centroids


def sequential_plus_plus(points_ND: Tensor, K: int, seed: int) -> Tensor:
    """k-means++ as published: one centroid after another, each drawn with probability proportional to d^2."""
    generator = torch.Generator().manual_seed(seed)
    points = points_ND.double()
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    cost = ((points - points[chosen[0]]) ** 2).sum(dim=1)
    while len(chosen) < K:
        chosen.append(int(torch.multinomial(cost, 1, generator=generator)))
        cost = torch.minimum(cost, ((points - points[chosen[-1]]) ** 2).sum(dim=1))
    return points_ND[chosen]


def objective(points_ND: Tensor, centroids_KD: Tensor, weights_N: Tensor | None = None) -> float:
    squares = torch.cdist(points_ND.double(), centroids_KD.double()).square().amin(dim=1)
    return float(squares.sum() if weights_N is None else squares @ weights_N.double())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clumps(N: int, D: int, num_clumps: int, *, spread: float, seed: int = 0) -> Tensor:
    which = torch.randint(num_clumps, (N,), generator=torch.Generator().manual_seed(seed + 1))
    return normal(num_clumps, D, seed=seed)[which] + spread * normal(N, D, seed=seed + 2)


def fit(points_ND: Tensor, K: int, seed: int = 0, **options: Any) -> KMeansResult:
    options.setdefault("point_ids_N", torch.arange(len(points_ND)))
    return kmeans(points_ND, K, seed=seed, **options)


def alone(steps: Steps[Tensor]) -> Tensor:
    """What a computation gives on one rank."""
    return run_together([steps], LocalCollectives())[0]


def sorted_rows(rows: Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


# --- the nearest centroid --------------------------------------------------------------------------------------------

LATTICE = torch.randint(0, 3, (500, 4), generator=torch.Generator().manual_seed(5)).float()
NEAREST_CASES = {
    "normal": (normal(300, 16), normal(100, 16, seed=1)),
    "one centroid": (normal(20, 3), normal(1, 3, seed=1)),
    "K is not a multiple of a class": (normal(300, 5), normal(67, 5, seed=1)),
    "no points": (normal(0, 5), normal(67, 5, seed=1)),
    "one dimension": (normal(200, 1), normal(50, 1, seed=1)),
    "float64": (normal(100, 7).double(), normal(40, 7, seed=1).double()),
    "bfloat16": (normal(100, 8).bfloat16(), normal(40, 8, seed=1)),
    "exact ties": (LATTICE, LATTICE[:70].unique(dim=0)[:, [1, 0, 3, 2]]),
    "equal centroids": (normal(200, 4), normal(10, 4, seed=1)[torch.arange(80) % 10]),
    "all centroids equal": (normal(50, 4), torch.ones(40, 4)),
    "a tight clump far away": (1e4 + normal(200, 6), 1e4 + normal(60, 6, seed=1)),
    "clumps finer than float32 scores": (clumps(300, 6, 4, spread=1e-6), clumps(90, 6, 4, spread=1e-6)),
    "points amid the centroids": (0.1 * normal(50, 5), 10 * torch.nn.functional.normalize(normal(79, 5, seed=1))),
    "an outlier": (torch.cat([normal(200, 4), normal(1, 4) * 1e6]), torch.cat([normal(60, 4), normal(1, 4) * 1e6])),
}


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("name", NEAREST_CASES)
def test_nearest_is_that_of_float64_brute_force(name: str, block: int | None) -> None:
    points, centroids = NEAREST_CASES[name]
    assignment, distance = assign_nearest(points, centroids, block=block)
    expected_assignment, expected_distance = brute_force(points, centroids)
    assert assignment.dtype == torch.int64
    torch.testing.assert_close(assignment, expected_assignment, rtol=0, atol=0)
    torch.testing.assert_close(distance.double(), expected_distance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("apart", [50, 48])  # 48: both twins are in one class of the two-level search
def test_a_point_that_is_a_centroid_has_distance_zero_even_beside_a_near_twin(apart: int) -> None:
    centroids = 100 + normal(apart, 8)
    twins = torch.nextafter(centroids, torch.full_like(centroids, math.inf))
    both = torch.cat([twins, centroids])
    assignment, distance = assign_nearest(both, both)
    assert assignment.tolist() == list(range(2 * apart))
    assert distance.tolist() == [0.0] * (2 * apart)


def test_autocast_and_the_matmul_precision_play_no_part() -> None:
    points, centroids = normal(500, 16), normal(100, 16, seed=1)
    expected = assign_nearest(points, centroids)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            observed = assign_nearest(points, centroids)
            observed_fit = fit(points, 100, num_iterations=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(observed[0], expected[0])
    assert torch.equal(observed[1], expected[1])
    assert torch.equal(observed_fit.centroids_KD, fit(points, 100, num_iterations=2).centroids_KD)


@pytest.mark.parametrize("share_right", [0.0, 0.5, 1.0])
def test_a_guess_changes_nothing(share_right: float) -> None:
    points, centroids = torch.cat([normal(400, 6), LATTICE[:, [0, 1, 2, 3, 0, 1]]]), LATTICE[:90].repeat(1, 2)[:, :6]
    centroids = centroids.unique(dim=0)
    expected, _ = brute_force(points, centroids)
    random = torch.Generator().manual_seed(3)
    wrong = torch.randint(len(centroids), (len(points),), generator=random)
    guess = torch.where(torch.rand(len(points), generator=random) < share_right, expected, wrong)
    observed, _ = Search(centroids, len(points), 64).nearest(points, guess)
    assert torch.equal(observed, expected)


@pytest.mark.parametrize(("points", "centroids"), [(normal(4, 3), normal(2, 2)), (normal(4, 3), normal(0, 3))])
def test_nearest_rejects_bad_shapes(points: Tensor, centroids: Tensor) -> None:
    with pytest.raises(ValueError, match="centroids"):
        assign_nearest(points, centroids)


# --- Lloyd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_iterations", [0, 1, 6])
def test_lloyd_is_that_of_a_naive_float64_one(num_iterations: int, weighted: bool) -> None:
    points, initial = normal(400, 5), normal(400, 5)[:20] * 0.9
    weights = normal(400, seed=2).abs() if weighted else None
    result = fit(
        points, 20, weights_N=weights, initial_centroids_KD=initial, num_iterations=num_iterations, tolerance=0.0
    )
    expected = naive_lloyd(points, torch.ones(400) if weights is None else weights, initial, num_iterations)
    assert result.iterations == num_iterations
    assert result.num_refilled == 0
    torch.testing.assert_close(result.centroids_KD.double(), expected, rtol=1e-5, atol=1e-6)
    assert result.objective == pytest.approx(objective(points, result.centroids_KD, weights), rel=1e-5)


def test_the_objective_never_rises_and_the_loop_stops_by_itself() -> None:
    result = fit(normal(2000, 4), 30, num_iterations=500, tolerance=0.0)
    assert result.converged
    assert 5 < result.iterations < 500
    assert len(result.objectives) == result.iterations + 1
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(result.objectives))
    assert result.objective == result.objectives[-1]


def test_tolerance_stops_at_the_first_small_improvement() -> None:
    points = normal(2000, 4)
    everything = fit(points, 30, num_iterations=60, tolerance=0.0).objectives
    result = fit(points, 30, num_iterations=60, tolerance=0.01)
    gains = [1 - after / before for before, after in pairwise(everything)]
    assert result.iterations == next(i for i, gain in enumerate(gains) if gain <= 0.01) + 1
    assert result.converged


def test_weights_are_repetitions() -> None:
    points, initial = normal(100, 3), normal(8, 3, seed=1)
    repeats = torch.randint(0, 4, (100,), generator=torch.Generator().manual_seed(2))
    weighted = fit(points, 8, weights_N=repeats.float(), initial_centroids_KD=initial)
    repeated = fit(points.repeat_interleave(repeats, dim=0), 8, initial_centroids_KD=initial)
    torch.testing.assert_close(weighted.centroids_KD, repeated.centroids_KD)
    assert weighted.objective == pytest.approx(repeated.objective)


def test_points_without_weight_count_for_nothing() -> None:
    points, weights = normal(200, 3), torch.ones(200)
    weights[::3] = 0
    points[::3] += 1000
    ids = torch.arange(200)
    keep = weights > 0
    with_them = fit(points, 8, weights_N=weights)
    without = fit(points[keep], 8, point_ids_N=ids[keep])
    assert torch.equal(with_them.centroids_KD, without.centroids_KD)


def test_centroids_without_points_are_refilled_where_the_error_is() -> None:
    points = clumps(600, 4, 12, spread=0.01)
    initial = torch.full((12, 4), 1e3) + normal(12, 4)
    initial[0] = 0
    result = fit(points, 12, initial_centroids_KD=initial)
    assert result.num_refilled >= 11
    assert result.num_empty == 0
    assert result.objective < 0.01 * objective(points, points.mean(dim=0, keepdim=True))


def test_weights_whose_float_sums_do_not_cancel_leave_no_ghost_centroid() -> None:
    weights = torch.full((300,), 0.1)
    initial = torch.cat([normal(9, 2), torch.full((1, 2), 50.0)])
    result = fit(normal(300, 2, seed=4), 10, weights_N=weights, initial_centroids_KD=initial)
    assert bool(result.centroids_KD.isfinite().all())
    assert result.num_empty == 0


# --- few points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [1, 5, 16])
def test_at_most_k_points_are_kept_exactly(num_points: int) -> None:
    points = 1e3 + normal(num_points, 6) * 1e-3
    result = fit(points, 16)
    _, distance = assign_nearest(points, result.centroids_KD)
    assert result.centroids_KD.shape == (16, 6)
    assert distance.tolist() == [0.0] * num_points
    assert result.objective == 0
    assert result.num_empty == 16 - num_points
    assert sorted_rows(result.centroids_KD.unique(dim=0)) == sorted_rows(points)


def test_points_nearer_to_each_other_than_scores_can_tell_are_kept_exactly() -> None:
    points = 1e-3 * normal(400, 3, seed=1)
    points[::2] += 1e3
    result = fit(points, 400)
    assert sorted_rows(result.centroids_KD) == sorted_rows(points)
    assert result.num_empty == 0


def test_a_lone_point_beside_a_thousandfold_twin_is_found() -> None:
    distinct = normal(12, 4)
    points = torch.cat([distinct.repeat(1000, 1), distinct[:1] + 1e-5])
    result = fit(points, 13, num_iterations=0)
    assert result.objective == 0
    assert sorted_rows(result.centroids_KD) == sorted_rows(points.unique(dim=0))


def test_at_most_k_distinct_float64_points_are_kept_exactly() -> None:
    points = normal(7, 3).double() / 3
    result = fit(points.repeat(30, 1), 7, weights_N=normal(210).abs() / 3)
    assert sorted_rows(result.centroids_KD) == sorted_rows(points)


def test_at_most_k_distinct_points_are_kept_exactly_over_ranks() -> None:
    distinct = normal(12, 4)
    points = distinct[torch.arange(5000) % 12]
    for result in on_threads(3, lambda ranks: fit_share(points, 12, ranks)):
        assert sorted_rows(result.centroids_KD) == sorted_rows(distinct)
        assert result.objective == 0


def test_one_distinct_point_too_many_costs_only_what_it_must() -> None:
    distinct = torch.cat([normal(12, 4), torch.zeros(1, 4)])
    distinct[12] = distinct[0] + 1e-4
    points = distinct[torch.arange(1300) % 13]
    result = fit(points, 12, seed=3)
    assert bool(result.centroids_KD.isfinite().all())
    assert result.objective == pytest.approx(100 * 2 * 4 * 0.5e-4**2, rel=1e-2)


def test_all_points_equal() -> None:
    result = fit(torch.full((50, 3), 0.1), 7)
    assert torch.equal(result.centroids_KD, torch.full((7, 3), 0.1))
    assert (result.objective, result.num_empty) == (0.0, 6)


# --- seeding ---------------------------------------------------------------------------------------------------------


def test_a_draw_follows_the_sequential_law() -> None:
    """The frequencies of (first, second) draws are w d^2 / sum, with d^2 updated in between."""
    points = torch.tensor([[0.0], [1.0], [1.2], [3.0]])
    weights = torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    share = Share(points_ND=points, ids_N=torch.arange(4), weights_N=weights)
    cost = points[:, 0].double() ** 2
    expected: dict[tuple[float, ...], float] = {}
    for first in (1, 2, 3):
        after = torch.minimum(cost, (points[:, 0].double() - float(points[first])) ** 2)
        for second in {1, 2, 3} - {first}:
            chance = (weights * cost / (weights @ cost))[first] * (weights * after / (weights @ after))[second]
            expected[float(points[first]), float(points[second])] = float(chance)
    num_draws = 4000
    observed = Counter(
        tuple(alone(draw(share, cost, points[:1], 2, (seed, "test"))).flatten().tolist()) for seed in range(num_draws)
    )
    assert set(observed) <= set(expected)
    for pair, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / num_draws)
        assert observed[pair] / num_draws == pytest.approx(chance, abs=4.5 * deviation), pair


def test_a_draw_sees_exact_costs_through_the_rounding_of_those_it_is_given() -> None:
    points, centroids = normal(1000, 4), normal(20, 4, seed=1)
    weights = torch.ones(1000, dtype=torch.float64)
    share = Share(points_ND=points, ids_N=torch.arange(1000), weights_N=weights)
    costs = brute_force(points, centroids)[1]
    for seed in range(20):
        rounded = costs * (1 + 1e-3 * normal(1000, seed=seed).double())
        exact, noisy = (alone(draw(share, c, centroids, 30, (seed,))) for c in (costs, rounded))
        assert torch.equal(exact, noisy)


SEEDING_CASES = {
    "normal": normal(3000, 8),
    "as many clumps as centroids": clumps(3000, 8, 60, spread=0.02),
    "heavy tails": normal(3000, 8) * normal(3000, 1, seed=1).exp(),
}


@pytest.mark.parametrize("name", SEEDING_CASES)
def test_seeding_is_as_good_as_sequential_k_means_plus_plus(name: str) -> None:
    points, seeds = SEEDING_CASES[name], range(8)
    ours = [fit(points, 60, seed, num_iterations=0).objective for seed in seeds]
    reference = [objective(points, sequential_plus_plus(points, 60, seed)) for seed in seeds]
    # Means of logarithms: with clumps, one clump that is missed multiplies the objective.
    ratio = math.exp(sum(map(math.log, ours)) / len(ours) - sum(map(math.log, reference)) / len(reference))
    assert ratio < (1.5 if "clumps" in name else 1.06)
    final = [fit(points, 60, seed).objective for seed in seeds]
    starts = [sequential_plus_plus(points, 60, seed) for seed in seeds]
    final_reference = [fit(points, 60, initial_centroids_KD=start).objective for start in starts]
    ratio = math.exp(sum(map(math.log, final)) / len(final) - sum(map(math.log, final_reference)) / len(final))
    assert ratio < (1.5 if "clumps" in name else 1.03)


# --- what the result may depend on -----------------------------------------------------------------------------------


def fit_share(points: Tensor, K: int, ranks: Collectives, starts: list[int] | None = None, **options: Any) -> Any:
    """K-means on this rank's part of points whose ids are their positions times a large odd number."""
    starts = starts or [len(points) * rank // ranks.world_size for rank in range(ranks.world_size)] + [len(points)]
    mine = torch.arange(starts[ranks.rank], starts[ranks.rank + 1])
    weights = 1 + (mine % 5) / 3
    return kmeans(
        points[mine], K, seed=7, point_ids_N=mine * 1_000_003, weights_N=weights, collectives=ranks, **options
    )


def test_the_seed_decides() -> None:
    points = normal(500, 4)
    assert torch.equal(fit(points, 20, 1).centroids_KD, fit(points, 20, 1).centroids_KD)
    assert not torch.equal(fit(points, 20, 1).centroids_KD, fit(points, 20, 2).centroids_KD)


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
    points = normal(300, 4)
    torch.manual_seed(0)
    first, drawn = fit(points, 10).centroids_KD, torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    assert torch.equal(fit(points, 10).centroids_KD, first)


@pytest.mark.parametrize(
    "starts",
    [[0, 2500], [0, 1250, 2500], [0, 0, 2500], [0, 1, 1700, 2500], [0, 700, 700, 700, 2500], [0, 2500, 2500, 2500]],
)
@pytest.mark.parametrize("far_away", [0.0, 1e3])
def test_the_split_does_not_matter(starts: list[int], far_away: float) -> None:
    points = far_away + clumps(2500, 6, 50, spread=0.3)
    alone = fit_share(points, 40, LocalCollectives())
    for result in on_threads(len(starts) - 1, lambda ranks: fit_share(points, 40, ranks, starts)):
        assert torch.equal(result.centroids_KD, alone.centroids_KD)
        assert result.objective == pytest.approx(alone.objective, rel=1e-12)
        assert result.iterations == alone.iterations


def test_neither_order_nor_block_matters() -> None:
    points, ids = normal(1500, 6), torch.arange(1500) * 17
    shuffled = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    first = fit(points, 40, point_ids_N=ids)
    for block in (None, 13):
        second = fit(points[shuffled], 40, point_ids_N=ids[shuffled], block=block)
        assert torch.equal(first.centroids_KD, second.centroids_KD)


def test_refilling_does_not_depend_on_the_split() -> None:
    points, initial = clumps(3000, 8, 40, spread=0.4), 30 + normal(50, 8, seed=1)
    alone = fit_share(points, 50, LocalCollectives(), initial_centroids_KD=initial)
    assert alone.num_refilled > 0
    for result in on_threads(3, lambda ranks: fit_share(points, 50, ranks, initial_centroids_KD=initial)):
        assert torch.equal(result.centroids_KD, alone.centroids_KD)
        assert result.num_refilled == alone.num_refilled


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_points_that_are_not_finite_are_counted_on_every_rank() -> None:
    points = normal(100, 3)
    points[[3, 50, 99], [0, 1, 2]] = torch.tensor([math.nan, math.inf, -math.inf])
    for error in on_threads(2, lambda ranks: fit_share(points, 5, ranks)):
        assert isinstance(error, ValueError)
        assert "3 of 100 points are not finite" in str(error)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (normal(0, 3), {}, "nothing to cluster"),
        (normal(5, 3), {"weights_N": torch.zeros(5)}, "none of positive weight"),
        (normal(5, 3), {"weights_N": torch.tensor([1.0, -1, 1, 1, math.nan])}, "2 of 5 weights are negative"),
        (normal(5, 3), {"weights_N": torch.ones(4)}, "weights, one a point"),
        (normal(5, 3), {"point_ids_N": torch.arange(4)}, "ids"),
        (normal(5, 3), {"num_iterations": -1}, "num_iterations=-1"),
        (normal(5, 3), {"initial_centroids_KD": normal(3, 3)}, "initial centroids must be"),
        (normal(5), {}, "floating"),
        (torch.zeros(5, 3, dtype=torch.int64), {}, "floating"),
        (normal(5, 3) * 1e25, {}, "squares overflow"),
    ],
)
def test_bad_arguments(points: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(points, 2, **options)


def test_ranks_that_disagree_all_hear_of_it() -> None:
    for error in on_threads(3, lambda ranks: fit_share(normal(90, 3), 5 + (ranks.rank == 2), ranks)):
        assert isinstance(error, ValueError)
        assert "num_centroids must be the same on all ranks, got [5, 5, 6]" in str(error)


def test_ranks_with_different_options_all_hear_of_it() -> None:
    for error in on_threads(2, lambda ranks: fit_share(normal(90, 3), 5, ranks, num_iterations=3 + ranks.rank)):
        assert isinstance(error, ValueError)
        assert "num_iterations" in str(error)


def test_bad_arguments_on_one_rank_stop_all() -> None:
    def work(ranks: Collectives) -> Any:
        return fit(normal(20, 3), 5, weights_N=torch.ones(20 - ranks.rank), collectives=ranks)

    for error in on_threads(3, work):
        assert isinstance(error, RuntimeError)
        assert "failed on 2 of 3 ranks: rank 1: ValueError: need [20] weights" in str(error)
        assert "rank 2" in str(error)


@pytest.mark.parametrize("where", ["_local_statistics", "_local_candidates", "_costs_by_scores", "_check_arguments"])
def test_a_rank_that_fails_midway_stops_all(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    module = seeding if hasattr(seeding, where) else fitting
    original = getattr(module, where)
    broken = threading.local()

    def fails_on_rank_1(*arguments: Any) -> Any:
        if getattr(broken, "here", False):
            raise MemoryError("out of luck")
        return original(*arguments)

    monkeypatch.setattr(module, where, fails_on_rank_1)

    def work(ranks: Collectives) -> Any:
        broken.here = ranks.rank == 1
        return fit_share(normal(300, 3), 5, ranks)

    for error in on_threads(3, work):
        assert isinstance(error, RuntimeError)
        assert str(error) == "failed on 1 of 3 ranks: rank 1: MemoryError: out of luck"
