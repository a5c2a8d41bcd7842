"""Collections of CCE on circular memory, and what they look like at a moment, window by window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cce_torchrec import CompressedEmbeddingBagCollection
from cce_torchrec.methods import CCE, CCERobe
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from tests.unit.cce_tables import cce_table

V, D = 90, 8
METHODS = [
    CCERobe(num_cells=50, num_columns=2),
    CCERobe(num_cells=37, num_columns=4, num_helper_cells=11),  # cells are left over behind the last centroid
    CCERobe(num_cells=8, num_columns=1, num_helper_cells=8),
    CCERobe(num_cells=300, num_columns=8, num_helper_cells=1),  # two-byte offsets, windows of one cell
]


def build(method: CCERobe, **fields) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    table = cce_table(num_embeddings=V, embedding_dim=D, method=CCE(num_rows=1), **fields)  # type: ignore[arg-type]
    table.method = method
    return CompressedEmbeddingBagCollection(tables=[table])


def decoder_of(collection: CompressedEmbeddingBagCollection) -> CCERobeDecoder:
    decoder = collection.decoded_tables[0].decoder
    assert isinstance(decoder, CCERobeDecoder)
    return decoder


def window(memory: Tensor, offset: int, width: int) -> Tensor:
    return torch.stack([memory[(offset + cell) % len(memory)] for cell in range(width)])


@dataclass(frozen=True)
class Snapshot:
    """Copies of everything, floats in float64, and the vectors by the definition."""

    memory: Tensor
    helper: Tensor
    offsets: list[list[int]]
    helper_offsets: list[list[int]]
    width: int

    @classmethod
    def of(cls, decoder: CCERobeDecoder) -> "Snapshot":
        return cls(
            memory=decoder.memory.detach().double(),
            helper=decoder.helper.detach().double(),
            offsets=decoder.offsets.tolist(),
            helper_offsets=decoder.helper_offsets(torch.arange(V)).tolist(),
            width=decoder.width,
        )

    def column(self, number: int, column: int) -> Tensor:
        main = window(self.memory, self.offsets[number][column], self.width)
        return main + window(self.helper, self.helper_offsets[number][column], self.width)

    def vectors(self) -> Tensor:
        columns = range(D // self.width)
        return torch.stack([torch.cat([self.column(v, i) for i in columns]) for v in range(V)])
