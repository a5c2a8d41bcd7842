"""Clicks whose probability is known: a planted truth over Criteo's columns, and the least loss that any model can have.

Ids of a column follow Zipf's law and belong to clusters; the ids of a cluster all have one vector of low rank, so a small
table could hold them. The label is a coin of probability

    p = sigmoid(bias + scale * (w . ln(1 + x) + sum_f a[f, cluster_f] + sum_{f < g} u[f, cluster_f] . u[g, cluster_g]))

A missing value contributes nothing. A predictor that knows p has, over given rows, an expected log loss of the mean entropy
of their coins; none has a lower one.

Shape suffixes: N rows, F sparse columns, C clusters, R rank, D dense columns.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dlrm_example.config import UsageError
from dlrm_example.data.sources import CRITEO_DENSE, CRITEO_SPARSE
from dlrm_example.data.vocabulary import mix

ABSENT = -1  # of an id or an integer
_CALIBRATION_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Some rows: what a model sees, and the probability that it does not."""

    dense_ND: np.ndarray
    ids_NF: np.ndarray
    probability_N: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What decides the clicks.

    Args:
        num_ids: ids a column, before any is drawn.
        columns: how many sparse columns speak, from the first on. The others are noise, which a model that knows the truth
            does not need: the least loss over all columns is the least over these.
        clusters: different vectors a column.
        rank: dims of those vectors.
        zipf: exponent of the ids' frequencies by rank.
        signal: standard deviation of the log odds.
        bias: log odds where the rest is 0.
        missing: fraction of values that are absent.
    """

    num_ids: int = 1_000_000
    columns: int = len(CRITEO_SPARSE)
    clusters: int = 64
    rank: int = 4
    zipf: float = 1.05
    signal: float = 1.5
    bias: float = -1.1
    missing: float = 0.05
    seed: int = 1

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the first value that cannot be."""
        for name, least in (("num_ids", 1), ("clusters", 1), ("rank", 1), ("zipf", 0), ("signal", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be {least} or more")
        if not 1 <= self.columns <= len(CRITEO_SPARSE):
            raise UsageError(f"--columns is {self.columns}; it must be from 1 to {len(CRITEO_SPARSE)}")
        if self.num_ids > 2**31:
            raise UsageError(f"--num_ids is {self.num_ids}; it must be at most 2^31, since ids are written in 32 bits")
        if not 0 <= self.missing < 1:
            raise UsageError(f"--missing is {self.missing}; it must be a fraction below 1")

    def draw(self, count: int, chunk: int) -> Draw:
        """Rows number `chunk` of any length; a function of the seed and both numbers."""
        random = np.random.default_rng([self.seed, 1, chunk])
        dense_ND = np.floor(np.exp(random.normal(1.5, 1.5, (count, len(CRITEO_DENSE))))).astype(np.int64)
        ids_NF = self._zipf(random.random((count, len(CRITEO_SPARSE))))
        for values in (dense_ND, ids_NF):
            values[random.random(values.shape, dtype=np.float32) < self.missing] = ABSENT
        centre, scale = self._calibration
        probability_N = 1.0 / (1.0 + np.exp(-(self.bias + scale * (self.scores(dense_ND, ids_NF) - centre))))
        labels_N = (random.random(count) < probability_N).astype(np.int8)
        return Draw(dense_ND=dense_ND, ids_NF=ids_NF, probability_N=probability_N, labels_N=labels_N)

    def scores(self, dense_ND: np.ndarray, ids_NF: np.ndarray) -> np.ndarray:
        """What is in the brackets of the formula, by `sum_{f<g} u_f.u_g = (|sum u|^2 - sum |u|^2) / 2`."""
        w_D, a_FC, u_FCR = self._parts
        scores_N = np.log1p(np.maximum(dense_ND, 0)) @ w_D
        sum_NR = np.zeros((len(ids_NF), self.rank))
        for column in range(self.columns):
            ids_N = ids_NF[:, column]
            cluster_N = self.cluster(column, ids_N)
            present_N = ids_N != ABSENT
            vectors_NR = u_FCR[column, cluster_N] * present_N[:, None]
            scores_N += a_FC[column, cluster_N] * present_N - 0.5 * np.square(vectors_NR).sum(axis=1)
            sum_NR += vectors_NR
        return scores_N + 0.5 * np.square(sum_NR).sum(axis=1)

    def cluster(self, column: int, ids_N: np.ndarray) -> np.ndarray:
        """By hashing, so that nothing of the size of a column is held."""
        salt = mix(np.array([self.seed * len(CRITEO_SPARSE) + column], np.uint64))
        return (mix(ids_N.astype(np.uint64) ^ salt) % np.uint64(self.clusters)).astype(np.int64)

    def _zipf(self, uniform: np.ndarray) -> np.ndarray:
        """Ranks from 0, of probability proportional to the integral of x^-zipf from rank + 1 to rank + 2."""
        power = 1.0 - self.zipf
        if abs(power) < 1e-9:
            points = (self.num_ids + 1.0) ** uniform
        else:
            points = (1.0 + uniform * ((self.num_ids + 1.0) ** power - 1.0)) ** (1.0 / power)
        return np.minimum(points.astype(np.int64) - 1, self.num_ids - 1)

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, 0])
        columns = self.columns
        w_D = random.normal(size=len(CRITEO_DENSE)) / len(CRITEO_DENSE) ** 0.5
        a_FC = random.normal(size=(columns, self.clusters)) / columns**0.5
        u_FCR = random.normal(size=(columns, self.clusters, self.rank)) / (columns * self.rank**0.5) ** 0.5
        return w_D, a_FC, u_FCR

    @cached_property
    def _calibration(self) -> tuple[float, float]:
        """Mean of the scores, and what makes their deviation `signal`, over some rows of their own."""
        random = np.random.default_rng([self.seed, 2])
        dense_ND = np.floor(np.exp(random.normal(1.5, 1.5, (_CALIBRATION_ROWS, len(CRITEO_DENSE)))))
        scores_N = self.scores(dense_ND, self._zipf(random.random((_CALIBRATION_ROWS, len(CRITEO_SPARSE)))))
        return float(scores_N.mean()), self.signal / float(scores_N.std())


def entropy(probability_N: np.ndarray) -> np.ndarray:
    """Of each row's coin, in nats: the expected log loss of a predictor that knows its probability."""
    tiny = np.finfo(np.float64).tiny
    other_N = 1.0 - probability_N
    return -(probability_N * np.log(np.maximum(probability_N, tiny)) + other_N * np.log(np.maximum(other_N, tiny)))


def log_loss(probability_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Of each row's label, as it fell, under the truth."""
    return -np.log(np.where(labels_N == 1, probability_N, 1.0 - probability_N))
