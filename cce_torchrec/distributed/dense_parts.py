"""Decoders and projections across ranks: each rank has all of them, and decodes its own batch.

Their gradients are reduced by the ``DistributedDataParallel`` in which ``DistributedModelParallel`` wraps the model, as those
of any dense module, together with the steps of optimizers that were applied in backward.
"""

import torch
from torchrec.distributed.types import ShardingEnv

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.dense_parts import DenseParts
from cce_torchrec.distributed.build import broadcast
from cce_torchrec.in_backward import apply_in_ddp, requests_of
from cce_torchrec.lowering import Table


def replicate(module: CompressedEmbeddingBagCollection, tables: list[Table], env: ShardingEnv) -> DenseParts:
    """The dense parts of ``tables``, with the state and optimizers that they have in an unsharded collection.

    Args:
        module: the unsharded collection; where it is on "meta", the parts keep the parameters they were drawn with.
        tables: those of this rank, on its device.
        env: ranks; the state of rank 0 is everyone's.

    Raises:
        ValueError: where an optimizer was applied in backward that cannot step a dense parameter.
    """
    parts = DenseParts(tables)
    if not any(tensor.is_meta for tensor in module._decoders.parameters()):
        parts.load_state_dict(module._decoders.state_dict())
    with torch.no_grad():
        broadcast([*parts.parameters(), *parts.buffers()], env)
    asked = dict(module._decoders.named_parameters())
    for name, parameter in parts.named_parameters():
        parameter.requires_grad_(asked[name].requires_grad)
        apply_in_ddp(name.partition(".")[0], requests_of(asked[name]), parameter)
    return parts
