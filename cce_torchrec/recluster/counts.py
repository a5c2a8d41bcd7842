"""How often ids were seen, which says what they weigh in a re-clustering and which of them get stored assignments."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.recluster.gradients import collections_to_recluster, reclusterable_tables


class IdCounter:
    """Counts the ids of the tables that are re-clustered, in the memory of the host: 8 bytes an id of these tables.

    Args:
        module: anything that contains compressed collections, sharded or not.

    Example:
        >>> from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, recluster
        >>> table = CompressedEmbeddingBagConfig(
        ...     name="t",
        ...     num_embeddings=100,
        ...     embedding_dim=8,
        ...     feature_names=["f"],
        ...     method=CCE(num_rows=4, num_columns=2, num_assigned_ids=10),
        ... )
        >>> collection = CompressedEmbeddingBagCollection(tables=[table])
        >>> counter = IdCounter(collection)
        >>> counter.add(KeyedJaggedTensor(["f"], torch.tensor([7, 7, 42]), lengths=torch.tensor([3])))
        >>> counter.id_weights()["t"][[7, 42]].tolist()
        [2.0, 1.0]
        >>> recluster(collection, seed=0, id_weights=counter.id_weights()).tables[0].version
        1
    """

    def __init__(self, module: nn.Module) -> None:
        tables = [
            table for collection in collections_to_recluster(module) for table in reclusterable_tables(collection)
        ]
        self._configs: list[EmbeddingBagConfig] = [table.config for table in tables]
        self._counts = {config.name: torch.zeros(config.num_embeddings, dtype=torch.int64) for config in self._configs}

    def add(self, features: KeyedJaggedTensor) -> None:
        """Count a batch of ids; those out of bounds are not counted. Tables may have grown since the last one."""
        for config in self._configs:
            ids_n = torch.cat([features[name].values() for name in config.feature_names]).to("cpu", torch.int64)
            ids_n = ids_n[(ids_n >= 0) & (ids_n < config.num_embeddings)]
            counts_V = self._grown(config)
            counts_V.index_add_(0, ids_n, torch.ones_like(ids_n))

    def _grown(self, config: EmbeddingBagConfig) -> Tensor:
        counts_V = self._counts[config.name]
        if len(counts_V) < config.num_embeddings:
            counts_V = torch.cat([counts_V, counts_V.new_zeros(config.num_embeddings - len(counts_V))])
            self._counts[config.name] = counts_V
        return counts_V

    def id_weights(self, process_group: Any = None) -> dict[str, Tensor]:
        """The counts of all ranks, as :func:`recluster` takes them; collective where there is a process group.

        Args:
            process_group: of the ranks, one whose backend sums tensors of the CPU; ``None`` for this rank's counts.

        Returns:
            float64 [num_embeddings] by table; 1 for every id of a table of which none was seen.
        """
        weights = {}
        for config in self._configs:
            counts_V = self._grown(config).clone()
            if process_group is not None:
                dist.all_reduce(counts_V, group=process_group)
            weights[config.name] = (counts_V if counts_V.any() else torch.ones_like(counts_V)).double()
        return weights
