"""Our sharders among TorchRec's defaults."""

import sys
from collections.abc import Sequence

from torch import nn
from torchrec.distributed import sharding_plan
from torchrec.distributed.types import ModuleSharder

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.distributed import get_sharders

_ORIGINAL = sharding_plan.get_default_sharders
_OWN = "cce_torchrec"


def register_sharders() -> None:
    """Put our sharders among TorchRec's defaults: ``get_default_sharders()`` becomes :func:`get_sharders`.

    From then on a planner, ``DistributedModelParallel`` and ``shard`` know compressed collections without being told. The
    function is replaced wherever it was imported by name already, your own script included; a second call does nothing.

    Example:
        >>> register_sharders()
        >>> from torchrec.distributed.model_parallel import get_default_sharders
        >>> [type(sharder).__name__ for sharder in get_default_sharders()][0]
        'CompressedEmbeddingBagCollectionSharder'
        >>> restore_sharders()
    """
    _rebind(_ORIGINAL, get_sharders)


def restore_sharders() -> None:
    """Undo :func:`register_sharders`."""
    _rebind(get_sharders, _ORIGINAL)


def check_sharders(module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]] | None) -> None:
    """Raise a ``ValueError`` where a script gives sharders for a compressed model, and ours are not among them."""
    is_compressed = any(isinstance(part, CompressedEmbeddingBagCollection) for part in module.modules())
    known = sharders is None or any(each.module_type is CompressedEmbeddingBagCollection for each in sharders)
    if is_compressed and not known:
        raise ValueError(
            "The script gives DistributedModelParallel sharders of its own, which do not know compressed tables: have it "
            "take get_default_sharders(), which has ours while it is swapped, or give none."
        )


def _rebind(old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != _OWN and vars(module).get("get_default_sharders") is old:
            vars(module)["get_default_sharders"] = new
