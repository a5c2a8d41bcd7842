"""CCE collections for the re-clustering tests, and what they look like at a moment."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce_torchrec import CCE, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from cce_torchrec.methods.cce import CCERowMap


def cce_table(
    num_embeddings: int = 300, embedding_dim: int = 8, name: str = "t", method: CCE | None = None, **fields: Any
) -> CompressedEmbeddingBagConfig:
    return CompressedEmbeddingBagConfig(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        feature_names=[f"f_{name}"],
        init_fn=torch.nn.init.normal_,
        method=method or CCE(num_rows=12, num_columns=2),
        **fields,
    )


def build(*tables: CompressedEmbeddingBagConfig, seed: int = 0) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(seed)
    return CompressedEmbeddingBagCollection(tables=list(tables) or [cce_table()])


@dataclass(frozen=True)
class Snapshot:
    """Copies of everything that one table is made of."""

    vectors_VD: Tensor  # float64
    assignments_VC: Tensor
    helpers_VC: Tensor  # helper row of each id
    main: list[Tensor]  # main codebook of each column, float64
    helper: list[Tensor]
    version: int
    codebooks: list[torch.nn.Parameter]

    @classmethod
    def of(cls, collection: CompressedEmbeddingBagCollection, table: str = "t") -> "Snapshot":
        lowered = next(lowered for lowered in collection.lowered_tables if lowered.name == table)
        row_map = lowered.row_map
        assert isinstance(row_map, CCERowMap)
        books = [collection.codebook(name) for name in lowered.physical_names]
        copies = [book.detach().double() for book in books]
        main_rows = lowered.config.method.num_rows
        return cls(
            vectors_VD=collection.dense_weight(table).double(),
            assignments_VC=row_map.assigned(torch.arange(lowered.config.num_embeddings)).long(),
            helpers_VC=row_map.helper_rows(torch.arange(lowered.config.num_embeddings)).T.clone(),
            main=[copy[:main_rows] for copy in copies],
            helper=[copy[main_rows:] for copy in copies],
            version=int(row_map.version),
            codebooks=books,
        )

    @property
    def num_ids(self) -> int:
        return len(self.vectors_VD)

    def columns(self) -> list[Tensor]:
        """Each column's vectors of all ids, [V, D / c]."""
        return list(self.vectors_VD.chunk(len(self.main), dim=1))


def state_copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
