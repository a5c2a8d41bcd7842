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
from cce_torchrec.methods.bloom import Bloom
from cce_torchrec.methods.cce import CCE
from cce_torchrec.methods.cce_robe import CCERobe
from cce_torchrec.methods.ce import CE
from cce_torchrec.methods.dhe import DHE
from cce_torchrec.methods.full import FullTable
from cce_torchrec.methods.hash_embedding import HashEmbedding
from cce_torchrec.methods.hashed_net import HashedNet
from cce_torchrec.methods.hashing_trick import HashingTrick
from cce_torchrec.methods.low_dim import LowDim, mixed_dimensions
from cce_torchrec.methods.pq import PQ
from cce_torchrec.methods.qr import QR
from cce_torchrec.methods.residual_cce import ResidualCCE
from cce_torchrec.methods.robe import ROBE
from cce_torchrec.methods.tt_rec import TTRec

METHODS: dict[str, type[MethodConfig]] = {
    FullTable.key: FullTable,
    HashingTrick.key: HashingTrick,
    Bloom.key: Bloom,
    CE.key: CE,
    QR.key: QR,
    CCE.key: CCE,
    TTRec.key: TTRec,
    DHE.key: DHE,
    HashEmbedding.key: HashEmbedding,
    LowDim.key: LowDim,
    HashedNet.key: HashedNet,
    ROBE.key: ROBE,
    CCERobe.key: CCERobe,
    ResidualCCE.key: ResidualCCE,
    PQ.key: PQ,
}

__all__ = [
    "CCE",
    "CE",
    "DHE",
    "METHODS",
    "PQ",
    "QR",
    "ROBE",
    "Bloom",
    "CCERobe",
    "Column",
    "DecodeMethod",
    "Decoder",
    "DensePart",
    "FullTable",
    "HashEmbedding",
    "HashedNet",
    "HashingTrick",
    "LowDim",
    "MethodConfig",
    "Projection",
    "ResidualCCE",
    "RowMap",
    "RowMethod",
    "TTRec",
    "TableSpec",
    "mixed_dimensions",
]
