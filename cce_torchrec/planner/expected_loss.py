"""What compressing a table is expected to lose: a model, by which sizes can be compared before anything is trained.

    loss(table) = sum_v p_v |x_v - x'_v|^2 / |x|^2          p_v: share of the table's lookups that are of id v

The vectors x_v are taken to be unrelated, which no method can do worse than. Then:

    full                          0
    a hash to k rows              sum_v p_v q_v / (p_v + q_v),   q_v = (1 - p_v) / k
    k learned rows of d dims      (k^(-2/d) - V^(-2/d)) / (1 - V^(-2/d)),   0 from k = V on

Where only N ids have stored assignments, the most looked up ones, the rows of those are learned (N in place of V), and the
others are left to the hash.

A hashed row is the mean of its ids, weighted by their lookups: q_v is the weight of the others that id v is expected to share
it with. Learned rows quantise d dims by log2 k bits, which for Gaussian vectors leaves k^(-2/d) of their energy (the
rate-distortion function), and nothing once each id has its own. A sum of codebooks multiplies what each leaves.
"""

import numpy as np
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.methods import CCE, CE, FullTable, HashingTrick, MethodConfig, ResidualCCE
from cce_torchrec.planner.traffic import Traffic

PLANNABLE: tuple[type[MethodConfig], ...] = (CCE, ResidualCCE, CE, HashingTrick)


def expected_loss(method: MethodConfig, table: EmbeddingBagConfig, traffic: Traffic) -> float:
    """The share, between 0 and 1, of the energy of the table's lookups that a method is expected to lose.

    Args:
        method: one of :data:`PLANNABLE`, or full.
        table: its size.
        traffic: how often its ids are looked up.

    Example:
        >>> item = EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"])
        >>> round(expected_loss(CE(num_rows=100, num_columns=2), item, Traffic.even(1, 100)), 4)
        0.4975
    """
    if isinstance(method, FullTable):
        return 0.0
    if isinstance(method, CE | HashingTrick):
        return _hashed(traffic, method.num_rows)
    assert isinstance(method, CCE)
    width = table.embedding_dim // method.num_columns
    hashed, num_codes = _hashed(traffic, method.helper_rows), method.num_rows**method.num_assigned
    if method.num_assigned_ids is None:
        return _learned(num_codes, table.num_embeddings, width) * hashed
    warm = _share_of_first(traffic, method.num_assigned_ids)
    learned = _learned(num_codes, min(method.num_assigned_ids, table.num_embeddings), width)
    return (warm * learned + 1 - warm) * hashed


def _hashed(traffic: Traffic, num_rows: int) -> float:
    shares_U = traffic.shares_U
    others_U = (1 - shares_U) / num_rows
    return float(traffic.numbers_U @ (shares_U * others_U / (shares_U + others_U)))


def _share_of_first(traffic: Traffic, num_ids: int) -> float:
    """The share of the lookups that the most looked up ids have."""
    order_U = np.argsort(-traffic.shares_U)
    shares_U, numbers_U = traffic.shares_U[order_U], traffic.numbers_U[order_U]
    before_U = np.cumsum(numbers_U) - numbers_U
    return float(shares_U @ np.clip(num_ids - before_U, 0, numbers_U))


def _learned(num_codes: int, num_ids: int, width: int) -> float:
    if num_codes >= num_ids:
        return 0.0
    of_all = float(num_ids) ** (-2 / width)
    return (float(num_codes) ** (-2 / width) - of_all) / (1 - of_all)
