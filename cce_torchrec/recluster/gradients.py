"""Where ids ask to be before they are clustered, from the gradients that were recorded of them.

    wanted(v) = x(v) - rate * G(v) / ( T(v) + lambda )                          G, T: see id_gradients.py
    lambda    = damping * mean of T

For a likelihood, g g^T estimates the curvature of the loss. T bounds it even where all ids move together, since

    ( sum_o g_o . d_o )^2 <= sum_o |g_o| |d_o|^2 * sum_o' |g_o'|

so a step of rate 1 is short enough whatever the number of features, and one of rate 2 where the worst case is not at hand.
Damping keeps ids that were hardly seen where they are.

Before the first re-clustering that is a place which a hash has chosen, and says nothing of the id. An id starts there as far
as gradients were seen of it there, and else from m, the mean vector of the ids that were seen:

    wanted(v) = m + ( x(v) - m ) * T(v) / ( T(v) + lambda ) - rate * G(v) / ( T(v) + lambda )

which, for a rate of 1, is where T/2 |x - (x(v) - G/T)|^2 + lambda/2 |x - m|^2 is least. For a rate of r it is so with T / r
and lambda / r in place of T and lambda.

Shapes: N ids of a batch, U ids with gradients, D dims, W = D + 1.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import method_of
from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.id_gradients import MAX_BYTES, IdGradients
from cce_torchrec.lowering import Table
from cce_torchrec.methods.assignments import heaviest
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.vocabulary import Block, choose_among_ranks, gather_block
from cce_torchrec.sums_by_id import SumsById

Collection = CompressedEmbeddingBagCollection | ShardedCompressedEmbeddingBagCollection


class Targets:
    """Where the vectors of ids want to be.

    Args:
        ids_U: with gradients, in rising order.
        steps_UD: how far each wants to move.
        trust_U: how much of each id's distance from the mean is kept, in [0, 1]; of ids without gradients nothing is.
        mean_D: the mean; ``None`` for ids that start where they are.
    """

    def __init__(self, ids_U: Tensor, steps_UD: Tensor, trust_U: Tensor, mean_D: Tensor | None) -> None:
        self._ids_U, self._mean_D = ids_U, mean_D
        self._steps = torch.cat([steps_UD, steps_UD.new_zeros(1, steps_UD.shape[1])])  # the last row: no gradient
        self._trust = torch.cat([trust_U, trust_U.new_zeros(1)])

    def __call__(self, ids_N: Tensor, vectors_ND: Tensor, dims: slice) -> Tensor:
        """Of some ids, in some dims: [N, dims].

        Args:
            ids_N: the ids.
            vectors_ND: what they decode to in these dims.
            dims: which.
        """
        last = len(self._ids_U)
        place_N = torch.full_like(ids_N, last)
        if last:
            found_N = torch.searchsorted(self._ids_U, ids_N).clamp_(max=last - 1)
            place_N = torch.where(self._ids_U[found_N] == ids_N, found_N, last)
        if self._mean_D is not None:
            mean_D = self._mean_D[dims]
            vectors_ND = mean_D + (vectors_ND - mean_D) * self._trust[place_N, None]
        return vectors_ND + self._steps[:, dims][place_N]


def gather_sums(recorded: SumsById | None, block: Block, collectives: Collectives) -> SumsById | None:
    """What all ranks recorded of this rank's block of ids; collective.

    Args:
        recorded: of one table on this rank; ``None`` where nothing was, on all ranks or on none.
        block: the ids of this rank.
        collectives: how to reach the other ranks.
    """
    if recorded is None:
        return None
    return gather_block(recorded, block, collectives)


def targets_from(
    sums: SumsById | None,
    decode: Callable[[Tensor], Tensor] | None,
    config: ReclusterConfig,
    device: torch.device,
    collectives: Collectives,
) -> Targets | None:
    """Where this rank's block of ids wants to be; collective.

    Args:
        sums: as :func:`gather_sums` returns them.
        decode: the vectors of some ids, [N, D], where hashes have chosen them; else ``None``.
        config: the rate of the steps and their damping, and whether hashed vectors start from their mean.
        device: of the vectors.
        collectives: how to reach the other ranks.
    """
    if sums is None:
        return None
    ids_U, sums_UW = sums.sums()
    gradient_UD, bound_U = sums_UW[:, :-1], sums_UW[:, -1]
    totals = torch.stack([bound_U.double().sum(), torch.tensor(len(bound_U), dtype=torch.float64)])
    total, number = collectives.all_reduce_sum(totals).tolist()
    curvature_U = bound_U + config.gradient_damping * total / max(number, 1)
    is_seen_U = curvature_U > 0
    steps_UD = torch.where(is_seen_U[:, None], -config.gradient_step * gradient_UD / curvature_U[:, None], 0)
    trust_U = torch.where(is_seen_U, bound_U / curvature_U, 0)
    mean_D = None
    if decode is not None and config.start_from_mean and total > 0:
        batches = ids_U.to(device).split(config.decode_batch_size)
        mean_D = _mean_vector(batches, decode, steps_UD.shape[1], collectives)
    return Targets(ids_U.to(device), steps_UD.to(device), trust_U.to(device), mean_D)


def _mean_vector(
    batches: Sequence[Tensor], decode: Callable[[Tensor], Tensor], dim: int, collectives: Collectives
) -> Tensor:
    """Over the ids of all ranks: [D]; collective."""
    sums_E = torch.zeros(dim + 1, dtype=torch.float64, device=batches[0].device)
    for ids_N in batches:
        sums_E[:dim] += decode(ids_N).double().sum(dim=0)
        sums_E[dim] += len(ids_N)
    sums_E = collectives.all_reduce_sum(sums_E)
    return (sums_E[:dim] / sums_E[dim]).float()


def most_sensitive_ids(sums: SumsById, number: int, collectives: Collectives) -> Tensor:
    """The ids of all ranks' blocks on which the loss depends most, those of the largest T, in rising order; collective."""
    ids_U, sums_UW = sums.sums()
    return choose_among_ranks(ids_U, sums_UW[:, -1], lambda bounds_N: heaviest(bounds_N, number, above=-1), collectives)


def reclusterable_tables(collection: Collection) -> Iterator[Table]:
    """The tables of a collection whose assignments are learned."""
    tables: list[Table] = [*collection.lowered_tables, *collection.decoded_tables]
    return (table for table in tables if method_of(table.config).reclusterable)


def record_gradients(module: nn.Module, on: bool = True, max_bytes: int = MAX_BYTES) -> None:
    """Record the gradients by id from the next step on, for the next :func:`cce_torchrec.recluster`, or stop doing so.

    A re-clustering uses what was recorded on all ranks since the last one, and forgets it. It is kept in host memory:
    4 (D + 1) + 8 bytes for each different id that occurred on this rank, and as much again for what is being added.
    Losses must be means over the samples of a rank.

    Args:
        module: anything that contains compressed collections, sharded or not.
        on: whether to record; where it is on already, what was recorded is kept.
        max_bytes: of the sums of a collection on this rank, for each table an equal part; beyond that, the ids are
            forgotten about which the loss says least (whose T, see id_gradients.py, is smallest).

    Example:
        >>> from torchrec import KeyedJaggedTensor
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> model = CompressedEmbeddingBagCollection(tables=[table])
        >>> record_gradients(model)
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([7, 42]), torch.tensor([1, 1]))
        >>> model(ids)["f"].square().sum().backward()
        >>> model.id_gradients.by_table["t"].sums()[0]
        tensor([ 7, 42])
    """
    for collection in collections_to_recluster(module):
        if not on:
            collection.id_gradients = None
        elif collection.id_gradients is None:
            collection.id_gradients = IdGradients(list(reclusterable_tables(collection)), max_bytes)


def collections_to_recluster(module: nn.Module) -> list[Collection]:
    """Those with tables to re-cluster."""
    found = (collection for collection in module.modules() if isinstance(collection, Collection))
    return [collection for collection in found if any(True for _ in reclusterable_tables(collection))]
