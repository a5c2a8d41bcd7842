"""Residual CCE: several additive codebooks a column, all but the last by learned assignment."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cce_torchrec.methods.base import check_positive
from cce_torchrec.methods.cce import CCE

_DEFAULT_LEVELS = 3


def _check_levels(num_levels: int) -> None:
    check_positive(num_levels=num_levels)
    if num_levels < 2:
        raise ValueError(
            f"num_levels={num_levels} leaves no codebook with assignments: take 2 levels or more (2 is CCE), or CE."
        )


@dataclass(frozen=True, kw_only=True)
class ResidualCCE(CCE):
    """Residual CCE: vector(id) = concat_i ( sum_{l < L - 1} M_il[h_il(id)] + M'_i[h'_i(id)] ); two levels are CCE.

    ``h_il`` are stored assignments (blocks of ids until the first re-clustering), ``h'_i`` a hash function. :func:`recluster`
    works level by level, as residual quantisation does: M_i1 becomes the K-means centroids of the ids' column vectors, M_i2
    those of what the nearest of these leaves, and so on; M'_i the mean of what is left in the end.

    Args:
        num_rows: k, rows of each of a column's L - 1 codebooks with assignments.
        num_levels: L, codebooks a column, the hashed one counted; at least 2.
        num_columns: c, columns; must divide the embedding dim. Each is ``embedding_dim / c`` wide. By default half of CCE's,
            so that three levels store as much an id as CCE does.
        num_helper_rows: k', rows of each column's hashed codebook; ``None`` for as many as the others.
        seed: of the hash functions; the table's name is part of the seed.
        bit_packed: as for :class:`CCE`.
        num_assigned_ids: as for :class:`CCE`.
        min_id_count: as for :class:`CCE`.
        num_hot_ids: as for :class:`CCE`; the vector of a hot id is L times its row.
        initial_assignments: as for :class:`CCE`.

    Stored beside the parameters: V x c x (L - 1) assignments of 1, 2 or 4 bytes (the narrowest that holds k), or less as for
    :class:`CCE`.

    Raises:
        ValueError: sizes below 1, fewer than 2 levels.

    Paper: Chen, Guan & Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization", Sensors 2010, for the
    levels; Tsang & Ahle, "Clustering the Sketch", NeurIPS 2023, arXiv 2210.05974, for everything else. There each level is
    searched greedily, as here.

    Example:
        >>> ResidualCCE(num_rows=100, num_levels=4, num_columns=4).num_params(10_000, 16)
        6400
    """

    key: ClassVar[str] = "residual_cce"

    num_columns: int = 4
    num_levels: int = _DEFAULT_LEVELS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_levels(self.num_levels)

    @property
    def num_assigned(self) -> int:
        return self.num_levels - 1

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        num_levels = overrides.get("num_levels", _DEFAULT_LEVELS)
        _check_levels(num_levels)
        return cls._split_evenly(num_levels - 1, embedding_dim, num_params, overrides)
