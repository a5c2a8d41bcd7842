"""HashedNets: every element of the table is hashed into one flat memory."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cce_torchrec.methods.base import DecodeMethod, Decoder, TableSpec, check_bool
from cce_torchrec.methods.flat_memory import BlockDecoder, budget_cells, check_cells


@dataclass(frozen=True, kw_only=True)
class HashedNet(DecodeMethod):
    """HashedNets: the table is a virtual matrix whose elements share the numbers of one memory at random.

        vector(id)[d] = s_d(id) * memory[h_d(id)],    s_d(id) = -1 or 1

    Args:
        num_cells: M, numbers in the memory, below 2^30.
        signed: whether s is a hashed sign, which makes collisions cancel on average; else s = 1, which is better where
            vectors meet in a dot product (``docs/results/siblings.md``).
        seed: of the hash functions; the table's name is part of the seed.

    Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015, arXiv 1504.04788. There for the
    weights of dense layers; an embedding table is the layer whose inputs are one-hot.

    Example:
        >>> HashedNet(num_cells=1000).num_params(10_000, 16)
        1000
    """

    key: ClassVar[str] = "hashed_net"

    num_cells: int
    signed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_cells(num_cells=self.num_cells)
        check_bool(signed=self.signed)

    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.num_cells

    @classmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        return {"num_cells": budget_cells(cls.key, num_params, overrides.get("num_cells", 1))}

    def decoder(self, table: TableSpec) -> Decoder:
        return BlockDecoder(
            table, num_cells=self.num_cells, block_size=1, signed=self.signed, key=(self.seed, table.name, self.key)
        )
