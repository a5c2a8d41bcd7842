"""What a re-clustering is told, and what it tells."""

from dataclasses import dataclass
from typing import Literal, get_args

from cce_torchrec.methods.base import check_positive

OptimizerState = Literal["reset", "carry"]


@dataclass(frozen=True, kw_only=True)
class ReclusterConfig:
    """How :func:`cce_torchrec.recluster` clusters.

    Args:
        num_iterations: most Lloyd iterations of each K-means.
        tolerance: stop when an iteration improves the objective by less than this fraction.
        points_per_centroid: K-means is fitted on a sample of about this many ids a centroid, drawn in proportion to the
            ids' weights; every id is then assigned exactly.
        decode_batch_size: ids whose vectors are held at a time.
        gradient_step: rate of the steps by which vectors are moved before they are clustered, where gradients were recorded
            (:func:`cce_torchrec.record_gradients`). 1 is a Newton step by a bound of the curvature; 2, the default, is one
            by half of that bound, which is for the worst case (``docs/recluster.md``).
        gradient_damping: how much of the mean curvature is added to each id's.
        start_from_mean: where gradients were recorded, whether the first re-clustering takes ids for what the gradients say
            of them and else for the mean vector, since it was a hash that chose theirs.
        optimizer_state: of the rows that are rewritten. "carry" gives each new row the mean of the old state over the ids
            that use it; "reset" starts it at zero.

    Raises:
        ValueError: sizes below 1, a tolerance that is not in [0, 1), an unknown ``optimizer_state``.
    """

    num_iterations: int = 25
    tolerance: float = 1e-4
    points_per_centroid: int = 256
    decode_batch_size: int = 65_536
    gradient_step: float = 2.0
    gradient_damping: float = 2.0
    start_from_mean: bool = True
    optimizer_state: OptimizerState = "carry"

    def __post_init__(self) -> None:
        check_positive(
            num_iterations=self.num_iterations,
            points_per_centroid=self.points_per_centroid,
            decode_batch_size=self.decode_batch_size,
        )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} is not in [0, 1).")
        if not (self.gradient_step >= 0 and self.gradient_damping >= 0):
            raise ValueError(
                f"gradient_step={self.gradient_step} and gradient_damping={self.gradient_damping} must be 0 or more."
            )
        if self.optimizer_state not in get_args(OptimizerState):
            raise ValueError(f"optimizer_state={self.optimizer_state!r} is not one of {get_args(OptimizerState)}.")


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What a re-clustering did to one table.

    Attributes:
        table: its name.
        version: how many times it has been re-clustered by now.
        relative_squared_error: sum over ids of |x - x'|^2 / |x|^2, x and x' its vector before and after (weighted if ids
            are); 0 is lossless.
        moved_fraction: ids (of an evenly spaced sample, averaged over columns) that did not go with most of their old
            cluster.
        empty_clusters: centroids that no id uses, over all columns.
        seconds: wall-clock time.
    """

    table: str
    version: int
    relative_squared_error: float
    moved_fraction: float
    empty_clusters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ReclusterReport:
    """What a re-clustering did; prints as a table.

    Attributes:
        tables: one entry a re-clustered table.
        stalled_seconds: for how long the caller had to wait: for all of it, or, where it went on in the background, for
            its beginning, for what was not done when it was to be committed, and for the commit.
    """

    tables: tuple[TableReport, ...]
    stalled_seconds: float

    @property
    def seconds(self) -> float:
        """Wall-clock time of the clustering, over all tables."""
        return sum(table.seconds for table in self.tables)

    def __str__(self) -> str:
        header = f"{'table':<24}{'version':>8}{'rel. sq. error':>16}{'ids moved':>12}{'empty':>8}{'seconds':>10}"
        rows = [
            f"{row.table:<24}{row.version:>8}{row.relative_squared_error:>16.4f}{row.moved_fraction:>12.1%}"
            f"{row.empty_clusters:>8}{row.seconds:>10.2f}"
            for row in self.tables
        ]
        return "\n".join([header, *rows, f"training stood still for {self.stalled_seconds:.2f} s"])
