"""Triton's nearest centroids, in its interpreter, against all distances in float64."""

import pytest
import torch
from torch import Tensor

from cce_torchrec.recluster.nearest import Tracker, assign_nearest
from tests.gpu.conftest import Run


def made(N: int, D: int, K: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + D + K)
    return torch.randn(N, D, generator=generator), torch.randn(K, D, generator=generator)


def distances(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    return (points_ND.double()[:, None] - centroids_KD.double()).square().sum(2)


def check_two_least(N: int, D: int, K: int) -> None:
    from cce_torchrec.gpu.nearest import two_least

    points_ND, centroids_KD = made(N, D, K)
    norms_K = centroids_KD.double().square().sum(1)
    scores_NK = norms_K - 2 * points_ND.double() @ centroids_KD.double().T
    nearest_N, least_N, second_N = two_least(points_ND, centroids_KD.T.contiguous(), norms_K.float())
    ordered_NK = scores_NK.sort(dim=1).values.float()
    assert torch.equal(nearest_N, scores_NK.argmin(dim=1))
    torch.testing.assert_close(least_N, ordered_NK[:, 0], rtol=1e-5, atol=1e-5)
    expected_N = ordered_NK[:, 1] if K > 1 else torch.full((N,), torch.inf)
    torch.testing.assert_close(second_N, expected_N, rtol=1e-5, atol=1e-5)


SIZES = [(0, 4, 3), (1, 1, 1), (7, 5, 2), (200, 16, 64), (130, 4, 65), (300, 40, 150)]


@pytest.mark.parametrize(("N", "D", "K"), SIZES)
def test_the_two_least_scores(interpreter: Run, N: int, D: int, K: int) -> None:
    interpreter(check_two_least, N, D, K)


def check_assignment(N: int, D: int, K: int) -> None:
    points_ND, centroids_KD = made(N, D, K)
    tracker = Tracker(points_ND, K, None)
    for moved in (0.0, 0.5):
        moved_KD = centroids_KD + moved * made(N, D, K + 1)[1][:K]
        expected_NK = distances(points_ND, moved_KD)
        for assignment_N, distance_N in (assign_nearest(points_ND, moved_KD, block=64), tracker.nearest(moved_KD)):
            assert torch.equal(assignment_N, expected_NK.argmin(dim=1))
            torch.testing.assert_close(distance_N, expected_NK.amin(dim=1).float())


@pytest.mark.parametrize(("N", "D", "K"), SIZES[1:])
def test_the_nearest_of_centroids_that_move(interpreter: Run, N: int, D: int, K: int) -> None:
    interpreter(check_assignment, N, D, K)


def check_ties() -> None:
    points_ND = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]]) + 1000
    centroids_KD = torch.tensor([[2.0, 1.0], [0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [1.0, 2.0], [1.0, 0.0]]) + 1000
    assignment_N, distance_N = assign_nearest(points_ND, centroids_KD)
    assert assignment_N.tolist() == [1, 0, 0]  # the lowest of equals; scores alone could not tell
    assert distance_N.tolist() == [0, 2, 1]
    grid_ND = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    corners_KD = torch.cartesian_prod(*[torch.arange(0.5, 4.0)] * 3)
    expected_N = distances(grid_ND, corners_KD).argmin(dim=1)
    assert torch.equal(assign_nearest(grid_ND, corners_KD)[0], expected_N)


def check_equal_scores() -> None:
    from cce_torchrec.gpu.nearest import two_least

    generator = torch.Generator().manual_seed(0)  # small integers: no rounding, whatever is added up first
    points_ND, centroids_KD = (torch.randint(-8, 9, (n, 3), generator=generator).float() for n in (20, 50))
    four_KD = centroids_KD.repeat(4, 1)  # within a tile of centroids, and in several
    nearest_N, least_N, second_N = two_least(points_ND, four_KD.T.contiguous(), four_KD.square().sum(1))
    expected_NK = distances(points_ND, four_KD)
    is_least_NK = expected_NK == expected_NK.amin(dim=1, keepdim=True)
    assert torch.equal(nearest_N, torch.where(is_least_NK, torch.arange(200), 200).amin(dim=1))
    assert torch.equal(least_N, second_N)


def test_equal_scores(interpreter: Run) -> None:
    interpreter(check_equal_scores)


def test_ties_go_to_the_lowest_index(interpreter: Run) -> None:
    interpreter(check_ties)


def check_that_the_kernel_is_used() -> None:
    from unittest.mock import patch

    points_ND, centroids_KD = made(20, 4, 5)
    with patch("cce_torchrec.gpu.nearest.two_least", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            assign_nearest(points_ND, centroids_KD)
        expected_N = distances(points_ND, centroids_KD).argmin(dim=1)
        assert torch.equal(assign_nearest(points_ND.double(), centroids_KD)[0], expected_N)  # float64 is left alone


def test_the_kernel_is_used_for_float32(interpreter: Run) -> None:
    interpreter(check_that_the_kernel_is_used)
