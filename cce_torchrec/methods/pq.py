"""Product quantisation (PQ): a column's row is stored for each id, and learned from a trained full table."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cce_torchrec.methods.assignments import AssignmentStorage
from cce_torchrec.methods.base import RowMap, check_bool, check_divides, default_num_columns
from cce_torchrec.methods.cce import CCERowMap, Codebooks
from cce_torchrec.methods.ce import CE


@dataclass(frozen=True, kw_only=True)
class PQ(CE):
    """Product quantisation: vector(id) = concat_i M_i[h_i(id)], with h_i stored.

    Made of a trained full table by :func:`compress` with ``from_trained=True``: M_i are the K-means centroids of the
    table's i-th columns and h_i(id) is the nearest of them. Centroids can be trained further; assignments stay, and as
    all ids of a centroid have the same vector, re-clustering has nothing to learn. Trained from scratch it is :class:`CE`
    with its hashes stored.

    Args:
        num_rows: k, centroids a column.
        num_columns: c, columns; must divide the embedding dim. Each is ``embedding_dim / c`` wide.
        seed: of the hash functions that assign ids where nothing was learned; the table's name is part of the seed.
        bit_packed: whether assignments take ceil(log2 k) bits instead of 1, 2 or 4 bytes; results are the same.

    Stored beside the parameters: V x c assignments of 1, 2 or 4 bytes (the narrowest that holds k), or of the bits that k
    takes, filled up to a byte an id.

    Paper: Jégou, Douze & Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011, whose usual sizes, 8
    columns of 256 centroids, are the defaults.

    Example:
        >>> PQ(num_columns=4).num_params(10_000, 16)
        4096
    """

    key: ClassVar[str] = "pq"
    stores_assignments: ClassVar[bool] = True

    num_rows: int = 256
    num_columns: int = 8
    bit_packed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool(bit_packed=self.bit_packed)

    def sizes(self) -> dict[str, Any]:
        sizes = {name: value for name, value in super().sizes().items() if name != "bit_packed"}
        return {**sizes, **self.storage.sizes()}

    @property
    def storage(self) -> AssignmentStorage:
        """Of the assignments."""
        return AssignmentStorage(bit_packed=self.bit_packed)

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        sizes = super().largest_fields(num_embeddings, embedding_dim, num_params, overrides)
        return {**sizes, "num_columns": default_num_columns(embedding_dim, at_most=8)}

    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        check_divides(embedding_dim, self.num_columns)
        codebooks = Codebooks(
            num_columns=self.num_columns,
            num_assigned=1,
            num_rows=self.num_rows,
            num_helper_rows=0,
            storage=self.storage,
        )
        return CCERowMap(codebooks, (self.seed, table, self.key), num_embeddings, embedding_dim, device)
