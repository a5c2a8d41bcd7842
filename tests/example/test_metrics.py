"""Scores against their definitions in numpy, on one rank and on two that share the rows."""

import itertools

import numpy as np
import pytest
import torch

from dlrm_example.data.dataset import PADDING
from dlrm_example.metrics import RunningScores, Scores
from tests.distributed.harness import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets:UserWarning")


def rows(count: int, rate: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, some of them equal, and labels that they tell something of."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(count) < rate).astype(np.int64)
    return np.round(draw.normal(size=count) * 2 + labels, 1), labels


def defined(logits: np.ndarray, labels: np.ndarray) -> Scores:
    predictions = 1 / (1 + np.exp(-logits))
    bce = -np.where(labels == 1, np.log(predictions), np.log(1 - predictions)).mean()
    rate = labels.mean()
    positive, negative = logits[labels == 1][:, None], logits[labels == 0][None, :]
    pairs = (positive > negative) + 0.5 * (positive == negative)
    return Scores(
        bce=bce,
        auroc=pairs.mean(),
        ne=bce / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        calibration=predictions.sum() / labels.sum(),
    )


def score(logits: np.ndarray, labels: np.ndarray, batch_sizes: list[int]) -> Scores:
    """In batches; then with rows of padding."""
    scores = RunningScores(torch.device("cpu"))
    for first, last in itertools.pairwise(np.cumsum([0, *batch_sizes])):
        scores.update(torch.tensor(logits[first:last]).float(), torch.tensor(labels[first:last]))
    scores.update(torch.full((3,), 7.0), torch.full((3,), PADDING))
    return scores.compute()


def assert_equal(found: Scores, expected: Scores) -> None:
    assert vars(found) == pytest.approx(vars(expected), rel=1e-6)


@pytest.mark.parametrize("rate", [0.5, 0.03])
def test_scores_by_their_definitions(rate: float) -> None:
    logits, labels = rows(1500, rate)
    assert_equal(score(logits, labels, [1000, 499, 1]), defined(logits, labels))


def test_the_constant_mean_has_normalised_entropy_1_and_calibration_1() -> None:
    labels = np.array([1, 0, 0, 0] * 10)
    found = score(np.full(40, np.log(1 / 3)), labels, [40])
    assert (found.ne, found.calibration, found.auroc) == pytest.approx((1.0, 1.0, 0.5))


def test_one_class_only() -> None:
    found = score(np.zeros(4), np.zeros(4, dtype=np.int64), [4])
    assert (found.auroc, found.calibration) == (0.0, 0.0)
    assert found.bce == pytest.approx(np.log(2))


def scores_of_rank(rank: int, world_size: int, logits: np.ndarray, labels: np.ndarray) -> Scores:
    """A quarter of the rows on rank 0, the others on rank 1, which has more batches."""
    cut = len(labels) // 4
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    sizes = [cut] if rank == 0 else [cut, 2 * cut]
    return score(logits[mine], labels[mine], sizes)


@pytest.mark.distributed
def test_two_ranks_score_the_rows_of_both(ranks2: RankPool) -> None:
    logits, labels = rows(400, 0.3, seed=1)
    for found in ranks2.run(scores_of_rank, logits, labels):
        assert_equal(found, defined(logits, labels))
