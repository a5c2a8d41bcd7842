"""What compressing a table is expected to lose: a model, by which sizes can be compared before anything is trained.

    loss(table) = sum_v p_v |x_v - x'_v|^2 / |x|^2          p_v: share of the table's lookups that are of id v

The vectors x_v are taken to be unrelated, which no method can do worse than. Then:

    full                          0
    a hash to k rows              sum_v p_v q_v / (p_v + q_v),   q_v = (1 - p_v) / k
    k learned rows of d dims      (k^(-2/d) - V^(-2/d)) / (1 - V^(-2/d)),   0 from k = V on

Where only N ids have stored assignments, the most looked up ones, the rows of those are learned (N in place of V), and the
others are left to the hash of the helper. Hot ids, the most looked up ones too, lose nothing, and share no rows with
the others.

A hashed row is the mean of its ids, weighted by their lookups: q_v is the weight of the others that id v is expected to share
it with. Learned rows quantise d dims by log2 k bits, which for Gaussian vectors leaves k^(-2/d) of their energy (the
rate-distortion function), and nothing once each id has its own. A sum of codebooks multiplies what each leaves.
"""

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
        return traffic.lost_to_hash(method.num_rows)
    assert isinstance(method, CCE)
    width, num_codes = table.embedding_dim // method.num_columns, method.num_rows**method.num_assigned
    hot = min(method.num_hot_ids, table.num_embeddings)
    num_learned = min(method.num_assigned_ids or table.num_embeddings, table.num_embeddings) - hot
    shared = traffic.without_first(hot)
    warm = shared.total if method.num_assigned_ids is None else shared.share_of_first(num_learned)
    of_warm = warm / shared.total if shared.total > 0 else 1.0
    learned = _learned(num_codes, num_learned, width)
    return (of_warm * learned + 1 - of_warm) * shared.lost_to_hash(method.helper_rows)


def _learned(num_codes: int, num_ids: int, width: int) -> float:
    if num_codes >= num_ids:
        return 0.0
    of_all = float(num_ids) ** (-2 / width)
    return (float(num_codes) ** (-2 / width) - of_all) / (1 - of_all)
