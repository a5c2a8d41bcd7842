"""What one rank does in a re-clustering of one table, counted and not timed: distances, collectives, memory.

    fits         c * A times K-means with K centroids on N points of d dims: seeding, then n + 1 searches for the nearest
    walk         V / W ids are decoded, assigned and added up, column by column
    collectives  one sum an iteration, candidates and picks of each round of seeding, for all columns that are fitted
                 together; all sums at the end, assignments if replicated

What depends on the data is taken at its usual value: a seeding that draws all it wants in every round, no centroid that
loses its points, and all n iterations, where real fits may stop earlier.

Legend: V ids, W ranks, c columns of d dims, A codebooks with assignments a column, K rows of each, N points.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster import ReclusterConfig
from cce_torchrec.recluster.vocabulary import MOVED_SAMPLE, pair_dtype
from cce_torchrec.recluster.workspace import Workspace, columns_together, recluster_workspace

_WORD = 8  # bytes of a float64 or int64


class Message(NamedTuple):
    """Equal calls of one collective.

    Attributes:
        collective: its name in ``torch.distributed``.
        calls: how many.
        bytes: what one call is given by each rank.
    """

    collective: Literal["all_reduce", "all_gather"]
    calls: int
    bytes: int

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in all calls, by a ring."""
        each = 2 * (world_size - 1) / world_size if self.collective == "all_reduce" else world_size - 1
        return self.calls * self.bytes * each


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One K-means, as one rank sees it.

    Attributes:
        points: N, on this rank.
        num_centroids: K.
        dim: d.
        iterations: n, updates of the centroids.
        rounds: of the seeding: how many centroids each draws.
    """

    points: int
    num_centroids: int
    dim: int
    iterations: int
    rounds: tuple[int, ...]

    @classmethod
    def of(cls, points: int, num_centroids: int, dim: int, iterations: int) -> "Fit":
        """With rounds that double the centroids."""
        rounds: list[int] = []
        while (left := num_centroids - sum(rounds)) > 0:
            rounds.append(min(left, sum(rounds) + 1))
        return cls(points=points, num_centroids=num_centroids, dim=dim, iterations=iterations, rounds=tuple(rounds))

    @property
    def seeding_distances(self) -> int:
        """From every point to the centroids of every round but the last."""
        return self.points * sum(self.rounds[:-1])

    @property
    def candidate_distances(self) -> int:
        """Between the candidates of a race, each pick to all of them."""
        return sum(wanted * (2 * wanted + 16) for wanted in self.rounds)

    @property
    def search_distances(self) -> int:
        """From every point to every centroid, as often as its nearest is sought; bounds may save most of them."""
        return self.points * self.num_centroids * (self.iterations + 1)


@dataclass(frozen=True, kw_only=True)
class ReclusterWork:
    """The work of one rank on one table.

    Attributes:
        fit: of one column and level.
        num_fits: c * A.
        num_races: of the fits, those whose races this rank runs, for all ranks.
        ids: of this rank.
        num_columns: c.
        world_size: W.
        messages: of all collectives.
        workspace: bytes, as an upper bound.
    """

    fit: Fit
    num_fits: int
    num_races: int
    ids: int
    num_columns: int
    world_size: int
    messages: tuple[Message, ...]
    workspace: Workspace

    @property
    def assign_distances(self) -> int:
        """From every column of every id to every centroid, and from every point that a next level starts from."""
        between_levels = self.fit.points * (self.num_fits - self.num_columns)
        return (self.ids * self.num_fits + between_levels) * self.fit.num_centroids


def recluster_work(
    row_map: CCERowMap, config: ReclusterConfig, world_size: int, device_type: str, is_sharded: bool = False
) -> ReclusterWork:
    """The work of the rank that has most of it.

    Args:
        row_map: of the table, whole; may be on "meta". Its codebooks are replicated.
        config: of the re-clustering, which is to have no ``id_weights``; optimizer state that it carries is not counted.
        world_size: W.
        device_type: "cpu" or "cuda".
        is_sharded: whether each rank holds the assignments of its own ids only.

    Example:
        >>> import torch
        >>> from cce_torchrec import CCE
        >>> row_map = CCE(num_rows=256, num_columns=4).row_map("t", 10**10, 32, torch.device("meta"))
        >>> recluster_work(row_map, ReclusterConfig(), 128, "cuda", is_sharded=True).ids
        78125000
    """
    share = -(-row_map.num_embeddings // world_size)
    sampled = config.points_per_centroid * row_map.level_rows
    fit = Fit.of(
        points=min(share, -(-sampled // world_size)),
        num_centroids=row_map.level_rows,
        dim=row_map.columns[0].dim,
        iterations=config.num_iterations,
    )
    groups = _groups(row_map, config, world_size)
    messages: tuple[Message, ...] = ()
    if world_size > 1:
        messages = _messages(row_map, fit, groups, share, world_size, is_sharded)
    return ReclusterWork(
        fit=fit,
        num_fits=len(row_map.columns) * row_map.num_assigned,
        num_races=sum(calls * -(-together // world_size) for together, calls in groups.items()),
        ids=share,
        num_columns=len(row_map.columns),
        world_size=world_size,
        messages=messages,
        workspace=recluster_workspace(row_map, config, world_size, device_type, is_sharded),
    )


def _groups(row_map: CCERowMap, config: ReclusterConfig, world_size: int) -> Counter[int]:
    """How many columns are fitted together, and how often that is done."""
    columns, together = len(row_map.columns), columns_together(row_map, config, world_size)
    groups = Counter({together: columns // together * row_map.num_assigned})
    if columns % together:
        groups[columns % together] = row_map.num_assigned
    return groups


def _messages(
    row_map: CCERowMap, fit: Fit, groups: Counter[int], share: int, world_size: int, is_sharded: bool
) -> tuple[Message, ...]:
    """Of all collectives; each is preceded by two numbers of every rank, which each group of fits also ends with."""
    rows = sum(column.num_rows for column in row_map.columns)
    summed_rows = row_map.num_helper_rows + row_map.storage.num_hot_ids
    helpers = len(row_map.columns) * summed_rows * fit.dim
    step = max(1, row_map.num_embeddings // MOVED_SAMPLE)
    moved = -(-share // step) * row_map.assignments_per_id * pair_dtype(row_map.num_codes).itemsize
    gathers: list[tuple[int, int]] = []
    sums = [
        (1, 1),  # the weight of all ids, for the sample
        (1, 2 + 2 * rows + helpers),
        (1, 1),  # of those, the ones that stayed
    ]
    for together, calls in groups.items():
        gathers.append((calls, together * 9))  # arguments
        for wanted in fit.rounds:
            candidates = min(fit.points, 2 * wanted + 16)
            gathers.append((calls, together * candidates * (4 + fit.dim)))
            gathers.append((calls, -(-together // world_size) * wanted * 2))
        sums.append((calls * (fit.iterations + 1), together * (fit.num_centroids * (fit.dim + 1) + 1)))
    announced = 1 + sum(groups.values()) + sum(calls for calls, _ in gathers + sums)
    messages = [Message("all_gather", calls, words * _WORD) for calls, words in [(announced, 2), *gathers]]
    messages.append(Message("all_gather", 1, moved))
    messages += [Message("all_reduce", calls, words * _WORD) for calls, words in sums]
    if not is_sharded:
        size = share * row_map.assignments.shape[1] * row_map.assignments.element_size()
        messages += [Message("all_gather", 1, 2 * _WORD), Message("all_gather", 1, size)]
    return tuple(messages)
