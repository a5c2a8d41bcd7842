"""Fitting tables with stored assignments to full tables that were trained: post-training quantisation."""

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.recluster.collectives import LocalCollectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.counts import choose_ids
from cce_torchrec.recluster.table import recluster_table
from cce_torchrec.recluster.table_state import TableState
from cce_torchrec.recluster.vocabulary import check_weights

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit_to_trained(
    collection: CompressedEmbeddingBagCollection,
    trained: Mapping[str, Tensor],
    *,
    seed: int,
    config: ReclusterConfig,
    id_weights: Mapping[str, Tensor],
) -> None:
    """Make tables of a collection as near to trained full ones as their sizes allow.

    A re-clustering whose vectors are the rows of the full table: x_v = W[v].

    Args:
        collection: its tables by name in ``trained`` have stored assignments; changed in place.
        trained: the full tables, [num_embeddings, embedding_dim].
        seed: of the sample, the K-means and the helper hashes.
        config: of the K-means; there is no optimizer state yet.
        id_weights: how much each id matters, [num_embeddings] by table; 1 where missing.

    Raises:
        ValueError: where weights are NaN or infinite, or ``id_weights`` do not fit, or are missing where they are to say
            which ids have stored assignments.
    """
    tables = {table.name: table for table in collection.lowered_tables}
    for name, weight_VD in trained.items():
        table = tables[name]
        row_map = table.row_map
        assert isinstance(row_map, CCERowMap)
        weights_V = id_weights.get(name)
        if weights_V is not None:
            check_weights(name, weights_V, table.config.num_embeddings)
        counts = collection.id_counts.by_table.get(name)
        columns = weight_VD.detach().float().chunk(len(row_map.columns), dim=1)
        state = TableState(
            name=name,
            row_map=row_map,
            rows=partial(_row_of_each_column, len(columns)),
            codebooks=list(columns),
            optimizer_state=[column_VD.new_zeros(len(column_VD), 0) for column_VD in columns],
            weights_V=weights_V,
            chosen_ids=choose_ids(name, row_map, weights_V, counts.sums() if counts else None, LocalCollectives()),
        )
        new = recluster_table(state, seed=seed, config=config, collectives=LocalCollectives())
        row_map.replace(new.assignments, new.ids, new.helper_coefficients)
        for physical, codebook in zip(table.physical_names, new.codebooks, strict=True):
            collection.codebook(physical).copy_(codebook)
        logger.info("Table %r was fitted with a relative squared error of %.4f", name, new.relative_squared_error)


def _row_of_each_column(num_columns: int, ids_N: Tensor) -> Tensor:
    """Row = id, in the columns of a full table: [C, N, 1]."""
    return ids_N.view(1, -1, 1).expand(num_columns, -1, 1)
