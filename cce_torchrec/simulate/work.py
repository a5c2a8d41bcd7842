"""What one rank does in a re-clustering of one table, counted and not timed: distances, collectives, memory.

    fits         c * A times K-means with K centroids on N points of d dims: seeding, then n + 1 searches for the nearest
    walk         V / W ids are decoded, assigned and added up, column by column
    collectives  the sample and the centroids, where each rank fits columns of its own; else one sum an iteration, candidates
                 and picks of each round of seeding, for all columns that are fitted together; then all sums, and
                 assignments if replicated

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
from cce_torchrec.recluster.workspace import (
    Workspace,
    columns_of_a_rank,
    columns_together,
    recluster_workspace,
)

_WORD = 8  # bytes of a float64 or int64
_FLOAT = 4


class Message(NamedTuple):
    """Equal calls of one collective.

    Attributes:
        collective: its name in ``torch.distributed``.
        calls: how many.
        bytes: what one call is given by each rank.
    """

    collective: Literal["all_reduce", "all_gather", "all_to_all"]
    calls: int
    bytes: int

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in all calls; sums and gathers go by a ring."""
        others = world_size - 1
        shares = {"all_reduce": 2 * others / world_size, "all_gather": others, "all_to_all": others / world_size}
        return self.calls * self.bytes * shares[self.collective]


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
        num_fits: that this rank has a part in: c * A, or those of its own columns.
        num_races: of these, those whose races this rank runs.
        ids: of this rank.
        num_columns: c.
        num_levels: A.
        world_size: W.
        messages: of all collectives.
        workspace: bytes, as an upper bound.
    """

    fit: Fit
    num_fits: int
    num_races: int
    ids: int
    num_columns: int
    num_levels: int
    world_size: int
    messages: tuple[Message, ...]
    workspace: Workspace

    @property
    def assign_distances(self) -> int:
        """From every column of every id to every centroid, and from every point that a next level starts from."""
        between_levels = self.fit.points * (self.num_fits - self.num_fits // self.num_levels)
        return (self.ids * self.num_columns * self.num_levels + between_levels) * self.fit.num_centroids


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
    own = columns_of_a_rank(row_map, config, world_size)
    sharing = 1 if own else world_size  # ranks that share a fit
    sampled = config.points_per_centroid * row_map.level_rows
    fit = Fit.of(
        points=min(-(-row_map.num_embeddings // sharing), -(-sampled // sharing)),
        num_centroids=row_map.level_rows,
        dim=row_map.columns[0].dim,
        iterations=config.num_iterations,
    )
    groups = Counter({1: own * row_map.num_assigned}) if own else _groups(row_map, config, world_size)
    messages: tuple[Message, ...] = ()
    if world_size > 1:
        fitting = _messages_of_own(row_map, fit, own, world_size) if own else _messages_in_step(fit, groups, world_size)
        messages = _with_headers(fitting + _messages_of_walk(row_map, fit.dim, share, is_sharded), world_size)
    return ReclusterWork(
        fit=fit,
        num_fits=sum(together * calls for together, calls in groups.items()),
        num_races=sum(calls * -(-together // sharing) for together, calls in groups.items()),
        ids=share,
        num_columns=len(row_map.columns),
        num_levels=row_map.num_assigned,
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


def _messages_of_own(row_map: CCERowMap, fit: Fit, own: int, world_size: int) -> list[Message]:
    """The sample to all ranks, of each column to the rank that fits it; and the centroids."""
    points = -(-fit.points // world_size)
    return [
        Message("all_gather", 2, points * _WORD),  # ids, weights
        Message("all_to_all", own, world_size * points * fit.dim * _FLOAT),
        Message("all_gather", 1, own * row_map.num_assigned * fit.num_centroids * fit.dim * _FLOAT),
    ]


def _messages_in_step(fit: Fit, groups: Counter[int], world_size: int) -> list[Message]:
    """Of fits that all ranks share; each group also ends with two numbers of every rank."""
    messages = []
    for together, calls in groups.items():
        words = [together * 9]  # arguments
        for wanted in fit.rounds:
            words.append(together * min(fit.points, 2 * wanted + 16) * (4 + fit.dim))
            words.append(-(-together // world_size) * wanted * 2)
        messages += [Message("all_gather", calls, each * _WORD) for each in words]
        summed = together * (fit.num_centroids * (fit.dim + 1) + 1)
        messages.append(Message("all_reduce", calls * (fit.iterations + 1), summed * _WORD))
        messages.append(Message("all_gather", calls, 0))
    return messages


def _messages_of_walk(row_map: CCERowMap, dim: int, share: int, is_sharded: bool) -> list[Message]:
    """All that is not of fits."""
    rows = sum(column.num_rows for column in row_map.columns)
    helpers = len(row_map.columns) * (row_map.num_helper_rows + row_map.storage.num_hot_ids) * dim
    step = max(1, row_map.num_embeddings // MOVED_SAMPLE)
    moved = -(-share // step) * row_map.assignments_per_id * pair_dtype(row_map.num_codes).itemsize
    messages = [
        Message("all_reduce", 1, _WORD),  # the weight of all ids, for the sample
        Message("all_reduce", 1, (2 + 2 * rows + helpers) * _WORD),
        Message("all_gather", 1, moved),
        Message("all_reduce", 1, _WORD),  # of those, the ones that stayed
    ]
    if not is_sharded:
        size = share * row_map.assignments.shape[1] * row_map.assignments.element_size()
        messages.append(Message("all_gather", 1, size))
    return messages


def _with_headers(messages: list[Message], world_size: int) -> tuple[Message, ...]:
    """Each is preceded by two numbers of every rank, exchanges by two more and one a rank; those of 0 bytes are no more."""
    exchanges = sum(message.calls for message in messages if message.collective == "all_to_all")
    headers = [Message("all_gather", sum(message.calls for message in messages) + exchanges, 2 * _WORD)]
    if exchanges:
        headers.append(Message("all_to_all", exchanges, world_size * _WORD))
    return *headers, *(message for message in messages if message.bytes)
