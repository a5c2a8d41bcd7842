"""Re-clustering a model: read everything, compute new state beside the old, commit once on all ranks."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.growth import refuse_while_reclustering
from cce_torchrec.methods import METHODS
from cce_torchrec.recluster.config import ReclusterConfig, ReclusterReport
from cce_torchrec.recluster.gradients import Collection, reclusterable_tables
from cce_torchrec.recluster.vocabulary import check_weights
from cce_torchrec.recluster.work import Reclustering


def recluster(
    module: nn.Module,
    *,
    seed: int,
    config: ReclusterConfig | None = None,
    process_group: Any = None,
    optimizer: Optimizer | None = None,
    id_weights: Mapping[str, Tensor] | None = None,
) -> ReclusterReport:
    """Re-cluster every table with learned assignments (CCE, residual CCE, CCE on circular memory) in a model, sharded or not.

        M_i <- K-means centroids,  h_i <- nearest centroid,  h'_i <- fresh hash,  M'_i <- mean residuals

    Collective: where the model is sharded or ``process_group`` is given, every rank calls it at the same step. The result
    does not depend on the number of ranks, up to float rounding. Old state stands until every table of every rank is
    done; an error on one rank is raised on all, and then nothing has changed.

    Args:
        module: anything that contains compressed collections: a collection, a model, a ``DistributedModelParallel``.
        seed: of the sample, the K-means and the new helper hashes; the same on every rank.
        config: sizes, and what becomes of optimizer state; the defaults where ``None``.
        process_group: ranks that share the work on unsharded collections, which must be replicas of each other; a sharded
            collection always uses its own.
        optimizer: what trains the tables that no fused kernel trains (data-parallel ones, unsharded ones), so that its
            state of rewritten rows is reset or carried too.
        id_weights: how much each id matters, [num_embeddings] by logical table, such as its frequency; 1 where missing. Where
            only some ids have stored assignments, also which (else those seen most often in training).

    Returns:
        How each table changed; those of which no id is to have stored assignments yet do not.

    Raises:
        ValueError: where there is nothing to re-cluster, weights are NaN, ``id_weights`` do not fit, or the ids seen most
            often are to be chosen and none was seen.
        RuntimeError: where another rank failed.

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], method=CCE(num_rows=4, num_columns=2)
        ... )
        >>> recluster(CompressedEmbeddingBagCollection(tables=[table]), seed=0).tables[0].version
        1

    Paper: Tsang & Ahle, "Clustering the Sketch", NeurIPS 2023, arXiv 2210.05974, algorithm 3.
    """
    started = time.perf_counter()
    collections = checked_collections(module, id_weights or {})
    work = Reclustering(
        collections,
        seed=seed,
        config=config,
        process_group=process_group,
        optimizer=optimizer,
        id_weights=id_weights,
    )
    work.compute()
    tables = work.commit()
    for collection in collections:
        if collection.id_gradients is not None:
            collection.id_gradients.clear()
    return ReclusterReport(tables=tables, stalled_seconds=time.perf_counter() - started)


def _check_sharders(module: nn.Module) -> None:
    """Raise a ``ValueError`` where TorchRec's sharders have sharded what is inside a compressed collection."""
    for collection in module.modules():
        if isinstance(collection, CompressedEmbeddingBagCollection) and not isinstance(
            collection._embedding_bag_collection, EmbeddingBagCollection
        ):
            raise ValueError(
                "A compressed collection was sharded by TorchRec's sharders alone, which only see what is inside it: "
                "pass sharders=cce_torchrec.get_sharders() to DistributedModelParallel and to the planner."
            )


def checked_collections(module: nn.Module, id_weights: Mapping[str, Tensor]) -> list[Collection]:
    """The compressed collections of a model that can be re-clustered now, with these weights.

    Raises:
        RuntimeError: where they are being re-clustered.
        ValueError: where there is nothing to re-cluster, or weights do not fit.
    """
    _check_sharders(module)
    collections = [found for found in module.modules() if isinstance(found, Collection)]
    for collection in collections:
        refuse_while_reclustering(collection)
    tables = {table.name: table for collection in collections for table in reclusterable_tables(collection)}
    if not tables:
        methods = [key for key, method in METHODS.items() if method.reclusterable]
        raise ValueError(
            f"{type(module).__name__} has no table to re-cluster ({len(collections)} compressed collections): only the "
            f"methods {methods} have assignments to learn; give a table one of them."
        )
    for name, weights_V in id_weights.items():
        if name not in tables:
            raise ValueError(f"id_weights has {name!r}, which is not a table to re-cluster; those are {list(tables)}.")
        check_weights(name, weights_V, tables[name].config.num_embeddings)
    return collections
