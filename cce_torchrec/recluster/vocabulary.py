"""The ids of one table, shared out to the ranks: walking through them, weighing and sampling them, gathering what they got.

Shapes: V ids, N ids of a batch, C columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce_torchrec.hashing import mix64
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.sums_by_id import SumsById

MOVED_SAMPLE = 65_536


@dataclass(frozen=True)
class Block:
    """The ids of this rank, and how to walk through them: ``start .. stop - 1``, or those at these places of a list."""

    start: int
    stop: int
    batch: int
    device: torch.device
    ids: Tensor | None = None

    @classmethod
    def of_rank(
        cls, num_ids: int, batch: int, device: torch.device, collectives: Collectives, ids: Tensor | None = None
    ) -> "Block":
        """An equal share of ``num_ids`` ids, or of those listed in ``ids``, for each rank."""
        total = num_ids if ids is None else len(ids)
        share = -(-total // collectives.world_size)
        start = min(collectives.rank * share, total)
        return cls(start, min(start + share, total), batch, device, ids)

    def batches(self) -> Iterator[Tensor]:
        """The ids in order, a bounded number at a time."""
        for start in range(self.start, self.stop, self.batch):
            yield self.at(torch.arange(start, min(start + self.batch, self.stop), device=self.device))

    def span(self, num_ids: int) -> "Block":
        """Of all ``num_ids`` ids, those from this rank's first to before the next rank's first."""
        if self.ids is None:
            return self
        last = len(self.ids)
        start, stop = (int(self.ids[place]) if place < last else num_ids for place in (self.start, self.stop))
        return replace(self, start=0 if self.start == 0 else start, stop=stop, ids=None)

    def at(self, places_N: Tensor) -> Tensor:
        """The ids at some places of the walk of all ranks."""
        return places_N if self.ids is None else self.ids[places_N]


def check_weights(name: str, weights_V: Tensor, num_ids: int) -> None:
    """Raise a ``ValueError`` where these cannot be the weights of all ids of the table ``name``."""
    usable_V = (weights_V >= 0) & weights_V.isfinite()
    if weights_V.shape != (num_ids,) or not bool(usable_V.all()) or not bool((weights_V > 0).any()):
        low, high = (weights_V.min().item(), weights_V.max().item()) if weights_V.numel() else ("nothing", "nothing")
        raise ValueError(
            f"id_weights[{name!r}] must be [{num_ids}] finite numbers >= 0, not all 0; it is {tuple(weights_V.shape)} "
            f"with a minimum of {low} and a maximum of {high}."
        )


def id_weights(weights_V: Tensor | None, ids_N: Tensor) -> Tensor:
    """How much some ids matter: float64 [N]."""
    if weights_V is None:
        return torch.ones(len(ids_N), dtype=torch.float64, device=ids_N.device)
    return weights_V[ids_N.to(weights_V.device)].to(ids_N.device, torch.float64)


def sample(
    weights_V: Tensor | None, num_ids: int, block: Block, size: int, seed: int, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    """This rank's part of a Poisson sample of about ``size`` ids, and the weight each stands for.

    Id v is in with probability p_v = min(1, size * w_v / sum w) and then weighs w_v / p_v, so sums over the sample are
    unbiased, frequent ids are always in, and a table of at most ``size`` ids is in whole.
    """
    totals = torch.zeros(1, dtype=torch.float64, device=block.device)
    for ids_N in block.batches():
        totals += id_weights(weights_V, ids_N).sum()
    total = collectives.all_reduce_sum(totals)
    keep_everything = num_ids <= size
    ids, weights = [torch.empty(0, dtype=torch.int64, device=block.device)], [totals[:0]]
    for ids_N in block.batches():
        weights_N = id_weights(weights_V, ids_N)
        chance_N = torch.ones_like(weights_N) if keep_everything else (size * weights_N / total).clamp(max=1)
        uniform_N = (mix64(ids_N ^ seed) >> 11 & (2**53 - 1)) * 2.0**-53
        taken_N = uniform_N < chance_N
        ids.append(ids_N[taken_N])
        weights.append((weights_N / chance_N)[taken_N])
    return torch.cat(ids), torch.cat(weights)


def choose_among_ranks(
    ids_U: Tensor, weights_U: Tensor, choose: Callable[[Tensor], Tensor], collectives: Collectives
) -> Tensor:
    """The ids of the largest weights among those of all ranks' blocks, in rising order; collective.

    Args:
        ids_U: of this rank's block, in rising order.
        weights_U: theirs.
        choose: the places of the largest, in order; so those of a block are all of it that can be among them.
        collectives: how to reach the other ranks.
    """
    best = choose(weights_U)
    ids_N, weights_N = (collectives.all_gather_rows(found[best]) for found in (ids_U, weights_U))
    return ids_N[choose(weights_N)]


def gather_block(recorded: SumsById, block: Block, collectives: Collectives) -> SumsById:
    """What all ranks have recorded of the ids of this rank's block; collective."""
    blocks = collectives.all_gather_rows(torch.tensor([[block.start, block.stop]])).tolist()
    ids_U, sums_UW = recorded.sums()
    in_blocks = [(ids_U >= start) & (ids_U < stop) for start, stop in blocks]
    mine = recorded.empty_copy()
    mine.add(*(collectives.exchange_rows([rows[inside_U] for inside_U in in_blocks]) for rows in (ids_U, sums_UW)))
    return mine


def gather_assignments(share: Tensor, collectives: Collectives) -> Tensor:
    """All ranks' assignments in id order; as bytes, since not every backend knows int16."""
    return collectives.all_gather_rows(share.view(torch.uint8)).view(share.dtype)


def moved_sample(num_ids: int, block: Block) -> Tensor:
    """The places of this rank's ids on which :func:`moved_fraction` is measured."""
    return evenly_spaced(num_ids, block, MOVED_SAMPLE)


def evenly_spaced(num_ids: int, block: Block, size: int) -> Tensor:
    """The places of this rank's ids among about ``size`` that are evenly spaced over those of all ranks."""
    step = max(1, num_ids // size)
    first = min(-(-block.start // step) * step, block.stop)  # a short block may have none of them
    return torch.arange(first, block.stop, step, device=block.device)


def pair_dtype(num_clusters: int) -> torch.dtype:
    """The narrowest that every backend sends and that holds two clusters as one number."""
    return torch.int32 if num_clusters**2 <= torch.iinfo(torch.int32).max else torch.int64


def moved_fraction(before_NC: Tensor, after_NC: Tensor, num_clusters: int, collectives: Collectives) -> float:
    """Ids that did not follow the majority of their old cluster, over the given ids of all ranks and all columns.

    Args:
        before_NC: clusters, integers [N, C].
        after_NC: the same after the clustering.
        num_clusters: they are in [0, num_clusters).
        collectives: how to reach the other ranks.
    """
    pairs_NC = before_NC.to(pair_dtype(num_clusters), copy=True).mul_(num_clusters).add_(after_NC)
    pairs_NC = collectives.all_gather_rows(pairs_NC)
    stayed = torch.zeros(1, dtype=torch.int64, device=before_NC.device)
    for column, pairs_N in enumerate(pairs_NC.T):
        if not collectives.is_mine(column):
            continue
        pairs, counts = torch.unique(pairs_N, return_counts=True)
        most = torch.zeros(num_clusters, dtype=torch.int64, device=before_NC.device)
        stayed += most.scatter_reduce_(0, pairs.to(torch.int64) // num_clusters, counts, "amax").sum()
    return 1 - int(collectives.all_reduce_sum(stayed)) / pairs_NC.numel()


def check_finite(table: str, part: str, weights: Tensor, width: int) -> None:
    """Raise a ``ValueError`` where weights, read ``width`` at a time, are not finite or have squares that are not."""
    limit = (torch.finfo(weights.dtype).max / width) ** 0.5 / 64
    bad = int((~(weights.abs() < limit)).sum())
    if bad:
        raise ValueError(
            f"Table {table!r}: {bad} of {weights.numel()} weights of {part} are NaN or infinite (or above "
            f"{limit:.0e}, where squares overflow), so it cannot be re-clustered. Load the last good checkpoint, then "
            "lower the learning rate or clip gradients."
        )
