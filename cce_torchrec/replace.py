"""One collection in the place of another: what stays is copied, what is compressed starts anew or fitted to the old."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import CompressedEmbeddingBagConfig, method_of
from cce_torchrec.in_backward import apply_requests, requests_of
from cce_torchrec.methods import FullTable, MethodConfig
from cce_torchrec.recluster import ReclusterConfig
from cce_torchrec.recluster.trained import fit_to_trained

Collection: TypeAlias = EmbeddingBagCollection | CompressedEmbeddingBagCollection


@dataclass(frozen=True)
class Fit:
    """How tables are fitted to the trained ones that they replace."""

    seed: int
    config: ReclusterConfig
    id_weights: Mapping[str, Tensor]


def present_methods(collection: Collection) -> dict[str, MethodConfig]:
    """The method of every table; those of TorchRec's own collection are full."""
    is_compressed = isinstance(collection, CompressedEmbeddingBagCollection)
    return {c.name: method_of(c) if is_compressed else FullTable() for c in collection.embedding_bag_configs()}


def with_method(config: EmbeddingBagConfig, method: MethodConfig) -> CompressedEmbeddingBagConfig:
    """The config of the same table with another method; where that stores no assignments, they have no placement."""
    placement = {} if method.stores_assignments else {"assignment_placement": "replicated"}
    return CompressedEmbeddingBagConfig(
        **{f.name: getattr(config, f.name) for f in fields(config)} | placement | {"method": method}
    )


@torch.no_grad()
def replace_tables(
    collection: Collection, methods: Mapping[str, MethodConfig], fit: Fit | None
) -> CompressedEmbeddingBagCollection:
    """A copy of a collection in which some full tables have other methods.

    Args:
        collection: left as it is.
        methods: of the tables that change, full ones so far.
        fit: how to fit them to what they replace; they start anew where ``None``.
    """
    present = present_methods(collection)
    tables = [
        with_method(config, methods.get(config.name, method))
        for config, method in zip(collection.embedding_bag_configs(), present.values(), strict=True)
    ]
    is_compressed = isinstance(collection, CompressedEmbeddingBagCollection)
    options = {"bounds_check_mode": collection.bounds_check_mode} if is_compressed else {}
    replacement = CompressedEmbeddingBagCollection(tables, collection.is_weighted(), collection.device, **options)
    replacement.train(collection.training)
    bags = (collection._embedding_bag_collection if is_compressed else collection).embedding_bags
    to_fit = {}
    for table in replacement.lowered_tables:
        stays = method_of(table.config) == present[table.name]
        for name in table.physical_names:
            old, new = bags[name if stays else table.name].weight, replacement.codebook(name)
            if stays:
                new.requires_grad_(old.requires_grad)
                if old.device.type != "meta":
                    new.copy_(old)
            apply_requests(requests_of(old), new)
        if not stays:
            to_fit[table.name] = bags[table.name].weight
        elif is_compressed:
            table.row_map.load_state_dict(collection._row_maps[table.name].state_dict())
    if fit is not None:
        fit_to_trained(replacement, to_fit, seed=fit.seed, config=fit.config, id_weights=fit.id_weights)
    return replacement
