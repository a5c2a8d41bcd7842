"""What the contract measures in a process of its own: `python -m tests.contract.in_a_process digests` (or `peaks`).

Prints one JSON object, by variant.
"""

import ctypes
import gc
import hashlib
import json
import sys
from pathlib import Path

import torch

from cce_torchrec import CompressedEmbeddingBagCollection
from tests.contract import test_state
from tests.contract.cases import VARIANTS, Variant, make_table
from tests.unit.oracles import make_kjt

FEW, MANY, DIM = 10**4, 10**7, 16  # ids of a table, and dims
BUDGET = 200_000  # parameters, whose gradients take as much, whatever the number of ids


def digest(variant: Variant) -> str:
    """Of every parameter and buffer, after a re-clustering where there is one, and of what is looked up."""
    collection = test_state.trained(variant)
    tensors = [*collection.state_dict().values(), test_state.outputs(collection)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def _memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak(variant: Variant, num_embeddings: int) -> int:
    """By how many bytes the process grows, at most, in a forward and backward pass over 128 ids from all of the table."""
    budget = num_embeddings * DIM if variant.key == "full" else BUDGET
    method = variant.from_budget(num_embeddings, DIM, budget)
    table = make_table(method, num_embeddings=num_embeddings, embedding_dim=DIM)
    collection = CompressedEmbeddingBagCollection(tables=[table])
    step = num_embeddings // 128
    features = make_kjt({"f_t": [[step * bag, step * (bag + 64)] for bag in range(64)]})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would not count when it is used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _memory("VmRSS")
    collection(features)["f_t"].sum().backward()
    return _memory("VmHWM") - before


def peaks() -> dict[str, int]:
    """For many ids, when all that is loaded once is loaded; of the full table, whose gradient is as large, for fewer."""
    torch.set_num_threads(1)
    for variant in VARIANTS:
        peak(variant, FEW)
    return {str(v): peak(v, MANY // 10 if v.key == "full" else MANY) for v in VARIANTS}


def digests() -> dict[str, str]:
    return {str(variant): digest(variant) for variant in VARIANTS}


if __name__ == "__main__":
    print(json.dumps({"digests": digests, "peaks": peaks}[sys.argv[1]]()))
