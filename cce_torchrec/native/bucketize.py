"""Rows of a batch sorted by the rank that holds them, by a native kernel, narrow as they travel."""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.native.build import library


def bucketize(rows: KeyedJaggedTensor, block_sizes_F: Tensor, num_ranks: int) -> KeyedJaggedTensor | None:
    """What TorchRec's ``bucketize_kjt_before_all2all`` makes, in int32.

    Args:
        rows: on the CPU; each below 2^31 and of a rank that there is.
        block_sizes_F: int64, of each feature, how many rows in a row a rank holds.
        num_ranks: W.

    Returns:
        Bags [W, F, B] of rows counted from the rank's first; ``None`` where there is no library.
    """
    loaded = library()
    if loaded is None or not rows.values().is_cpu or torch.compiler.is_compiling():
        return None
    values, lengths = rows.values().long().contiguous(), rows.lengths().long().contiguous()
    given = rows.weights_or_none()
    weights = None if given is None else given.float().contiguous()
    out_lengths = torch.zeros(num_ranks * len(lengths), dtype=torch.int32)
    out_rows = torch.empty(len(values), dtype=torch.int32)
    out_weights = None if weights is None else torch.empty_like(weights)
    loaded.cce_bucketize(
        values.data_ptr(),
        None if weights is None else weights.data_ptr(),
        lengths.data_ptr(),
        block_sizes_F.data_ptr(),
        len(rows.keys()),
        rows.stride(),
        num_ranks,
        out_lengths.data_ptr(),
        out_rows.data_ptr(),
        None if out_weights is None else out_weights.data_ptr(),
    )
    return KeyedJaggedTensor(
        keys=rows.keys() * num_ranks, values=out_rows, lengths=out_lengths, weights=out_weights, stride=rows.stride()
    )
