"""ROBE: vectors are blocks of one flat circular memory, at hashed offsets."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cce_torchrec.methods.base import DecodeMethod, Decoder, TableSpec, check_bool, check_positive
from cce_torchrec.methods.flat_memory import BlockDecoder, budget_cells, check_cells, check_window

_MOST_DEFAULT_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class ROBE(DecodeMethod):
    """Random offset block embeddings: a vector is cut in blocks of Z dims, each a window of one circular memory.

        vector(id)[d] = s_b(id) * memory[(h_b(id) + d mod Z) mod M],    b = d div Z

    Args:
        num_cells: M, numbers in the memory, below 2^30.
        block_size: Z, from 1 to the embedding dim; where it does not divide that, the last block is shorter. Larger blocks
            are faster, smaller ones better (``docs/results/siblings.md``). :meth:`from_budget` cuts a vector in up to 8
            blocks of a multiple of 4 dims.
        signed: whether s is a hashed sign a block, as in feature hashing; else s = 1.
        seed: of the hash functions; the table's name is part of the seed.

    Paper: Desai, Chou & Shrivastava, "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM Model",
    MLSys 2022, arXiv 2108.02191. There all tables of a model share one array; here each has its own. There blocks may
    run on into the next id's vector (Z > D); here they end with the vector.

    Example:
        >>> ROBE(num_cells=1000, block_size=8).num_params(10_000, 16)
        1000
    """

    key: ClassVar[str] = "robe"

    num_cells: int
    block_size: int
    signed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_cells(num_cells=self.num_cells)
        check_positive(block_size=self.block_size)
        check_window(self.block_size, num_cells=self.num_cells)
        check_bool(signed=self.signed)

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.block_size > embedding_dim:
            raise ValueError(
                f"block_size={self.block_size} is above embedding_dim={embedding_dim}: a block is a part of a vector; "
                f"the nearest size that works is {embedding_dim}."
            )
        return self.num_cells

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        smallest = overrides.get("num_cells", overrides.get("block_size", 1))
        cells = overrides.get("num_cells", budget_cells(cls.key, num_params, smallest))
        eighth = 4 * -(-embedding_dim // (4 * _MOST_DEFAULT_BLOCKS))
        return {"num_cells": cells, "block_size": min(eighth, embedding_dim, cells)}

    def decoder(self, table: TableSpec) -> Decoder:
        self.num_params(table.num_embeddings, table.embedding_dim)
        return BlockDecoder(
            table,
            num_cells=self.num_cells,
            block_size=self.block_size,
            signed=self.signed,
            key=(self.seed, table.name, self.key),
        )
