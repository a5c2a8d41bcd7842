"""Compression methods, one file each; ``METHODS`` is the registry, one line each."""

from cce_torchrec.methods.base import (
    Column,
    DecodeMethod,
    Decoder,
    DensePart,
    MethodConfig,
    Projection,
    RowMap,
    RowMethod,
    TableSpec,
)
from cce_torchrec.methods.cce import CCE
from cce_torchrec.methods.ce import CE
from cce_torchrec.methods.dhe import DHE
from cce_torchrec.methods.full import FullTable
from cce_torchrec.methods.hash_embedding import HashEmbedding
from cce_torchrec.methods.hashing_trick import HashingTrick
from cce_torchrec.methods.low_dim import LowDim, mixed_dimensions
from cce_torchrec.methods.qr import QR
from cce_torchrec.methods.tt_rec import TTRec

METHODS: dict[str, type[MethodConfig]] = {
    FullTable.key: FullTable,
    HashingTrick.key: HashingTrick,
    CE.key: CE,
    QR.key: QR,
    CCE.key: CCE,
    TTRec.key: TTRec,
    DHE.key: DHE,
    HashEmbedding.key: HashEmbedding,
    LowDim.key: LowDim,
}

__all__ = [
    "CCE",
    "CE",
    "DHE",
    "METHODS",
    "QR",
    "Column",
    "DecodeMethod",
    "Decoder",
    "DensePart",
    "FullTable",
    "HashEmbedding",
    "HashingTrick",
    "LowDim",
    "MethodConfig",
    "Projection",
    "RowMap",
    "RowMethod",
    "TTRec",
    "TableSpec",
    "mixed_dimensions",
]
