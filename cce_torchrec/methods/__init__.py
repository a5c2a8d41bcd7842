"""Compression methods, one file each; ``METHODS`` is the registry, one line each."""

from cce_torchrec.methods.base import Column, DecodeMethod, Decoder, MethodConfig, RowMap, RowMethod, TableSpec
from cce_torchrec.methods.bloom import Bloom
from cce_torchrec.methods.cce import CCE
from cce_torchrec.methods.ce import CE
from cce_torchrec.methods.full import FullTable
from cce_torchrec.methods.hashing_trick import HashingTrick
from cce_torchrec.methods.pq import PQ
from cce_torchrec.methods.qr import QR
from cce_torchrec.methods.residual_cce import ResidualCCE

METHODS: dict[str, type[MethodConfig]] = {
    FullTable.key: FullTable,
    HashingTrick.key: HashingTrick,
    Bloom.key: Bloom,
    CE.key: CE,
    QR.key: QR,
    CCE.key: CCE,
    ResidualCCE.key: ResidualCCE,
    PQ.key: PQ,
}

__all__ = [
    "CCE",
    "CE",
    "METHODS",
    "PQ",
    "QR",
    "Bloom",
    "Column",
    "DecodeMethod",
    "Decoder",
    "FullTable",
    "HashingTrick",
    "MethodConfig",
    "ResidualCCE",
    "RowMap",
    "RowMethod",
    "TableSpec",
]
