"""What ranks record by id while they train, in a checkpoint: counts, and gradients where these are on.

A file a rank and kind; they are shared out to however many ranks load them.
"""

from pathlib import Path

import torch
from torch import nn

from cce_torchrec.recluster.gradients import Collection, collections_to_recluster, record_gradients
from cce_torchrec.sums_by_id import SumsById

_COUNTS, _GRADIENTS = "id_counts", "id_gradients"  # of files, and the number of the rank


def save_recorded(folder: Path, module: nn.Module, rank: int, world_size: int) -> None:
    """Write what this rank has recorded; no file where there is nothing."""
    for kind in (_COUNTS, _GRADIENTS):
        for file in folder.glob(f"{kind}_*.pt"):  # of an earlier save, perhaps by more ranks
            if _rank_of(file) % world_size == rank:
                file.unlink()
        found = {name: sums.sums() for name, sums in _recorded(module, kind).items()}
        if found:
            torch.save(found, folder / f"{kind}_{rank}.pt")


def load_recorded(folder: Path, module: nn.Module, rank: int, world_size: int) -> None:
    """Go on recording where :func:`save_recorded` was; what was recorded since is forgotten."""
    was_on = any(folder.glob(f"{_GRADIENTS}_*.pt"))
    record_gradients(module, on=was_on)  # with the limits that there were, where it was on
    for collection in collections_to_recluster(module):
        collection.id_counts.clear()
        if collection.id_gradients is not None:
            collection.id_gradients.clear()
    for kind in (_COUNTS, _GRADIENTS):
        files = sorted(folder.glob(f"{kind}_*.pt"), key=_rank_of)
        for file in files[rank::world_size]:
            saved = torch.load(file, map_location="cpu")
            for name, sums in _recorded(module, kind).items():
                sums.add(*saved[name])


def _recorded(module: nn.Module, kind: str) -> dict[str, SumsById]:
    """By number of the collection and name of the table."""
    return {
        f"{index}.{table}": sums
        for index, collection in enumerate(collections_to_recluster(module))
        for table, sums in _of_collection(collection, kind).items()
    }


def _of_collection(collection: Collection, kind: str) -> dict[str, SumsById]:
    if kind == _COUNTS:
        return {table: counts.sums() for table, counts in collection.id_counts.by_table.items()}
    if collection.reclustering is not None:  # which is begun again from these where the checkpoint is loaded
        return collection.reclustering.gradients(collection)
    return {} if collection.id_gradients is None else collection.id_gradients.by_table


def _rank_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])
