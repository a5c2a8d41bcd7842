"""Tables that take in more ids while they are trained: only what is stored by id grows."""

from collections.abc import Sequence
from typing import Any

from cce_torchrec.config import method_of
from cce_torchrec.lowering import Table, rename_layout
from cce_torchrec.methods.base import check_positive


def refuse_while_reclustering(collection: Any) -> None:
    """Raise a ``RuntimeError`` where tables of a collection are being re-clustered in the background."""
    if collection.reclustering is not None:
        raise RuntimeError(
            "The tables are being re-clustered in the background: commit() or cancel() that first, "
            "collection.reclustering.cancel() where nothing else holds it."
        )


def check_growth(tables: Sequence[Table], name: str, num_embeddings: int) -> Table:
    """The table called ``name``.

    Raises:
        ValueError: where there is none, it has more ids already, or its method has parameters or blocks that are sized by it.
    """
    check_positive(num_embeddings=num_embeddings)
    found = {table.name: table for table in tables}.get(name)
    if found is None:
        raise ValueError(f"No table {name!r}; the tables are {[table.name for table in tables]}.")
    now = found.config.num_embeddings
    if num_embeddings < now:
        raise ValueError(
            f"Table {name!r} has {now} ids, so it cannot grow to {num_embeddings}: ids are never taken away."
        )
    if not found.id_map.can_grow:
        raise ValueError(
            f"Table {name!r} cannot grow: its method {method_of(found.config).key!r} has parameters, or blocks of ids, "
            "sized by num_embeddings. Leave room in that from the start, or choose a method that does not depend on it, such "
            "as cce or hashing_trick (with hashes)."
        )
    return found


def grow_table(table: Table, num_embeddings: int) -> None:
    """Take in the ids up to ``num_embeddings - 1``, after :func:`check_growth`."""
    table.id_map.grow(num_embeddings)
    set_size(table, num_embeddings)


def set_size(table: Table, num_embeddings: int) -> None:
    """Say how many ids a table has, after what it stores has grown."""
    table.config.num_embeddings = num_embeddings
    rename_layout(table)
