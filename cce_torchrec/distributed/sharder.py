"""The sharder: what makes ``DistributedModelParallel`` and the planner know compressed collections."""

from typing import Any, cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import QuantizedCommCodecs
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.distributed.groups import CLIENT_SIDE
from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection


class CompressedEmbeddingBagCollectionSharder(BaseEmbeddingSharder[CompressedEmbeddingBagCollection]):
    """Shards :class:`CompressedEmbeddingBagCollection`; same signature as TorchRec's ``EmbeddingBagCollectionSharder``.

    Args:
        fused_params: for the fused kernels of the codebooks, such as ``{"optimizer": ..., "learning_rate": ...}``;
            its ``bounds_check_mode`` also applies to the ids.
        qcomm_codecs_registry: quantised communication, as TorchRec's.

    Example:
        >>> sharder = CompressedEmbeddingBagCollectionSharder(fused_params={"learning_rate": 0.1})
        >>> sharder.module_type.__name__
        'CompressedEmbeddingBagCollection'
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry)
        self._ebc_sharder = EmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)

    def shard(
        self,
        module: CompressedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCompressedEmbeddingBagCollection:
        """Shard a collection by a plan whose keys are its physical tables.

        Raises:
            ValueError: where a table is missing in the plan.
        """
        missing = [name for name in self.shardable_parameters(module) if name not in params]
        if missing:
            raise ValueError(
                f"The sharding plan has no entry for {missing} (it has {list(params)}): plan with a planner that was "
                "given this sharder, or add them. Column i of a table t is the physical table t:i."
            )
        mode: BoundsCheckMode | None = (self.fused_params or {}).get("bounds_check_mode")
        device = torch.device("cpu") if device is None else device
        return ShardedCompressedEmbeddingBagCollection(
            module, params, self._ebc_sharder, env, device, bounds_check_mode=mode, module_fqn=module_fqn
        )

    def shardable_parameters(self, module: CompressedEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """The codebooks by physical table: ``t`` for tables of one column, else ``t:0``, ``t:1``, ..."""
        return self._ebc_sharder.shardable_parameters(module._embedding_bag_collection)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All of TorchRec's types; its own list hides the row-wise ones on the CPU, where they work."""
        return list(dict.fromkeys([*self._ebc_sharder.sharding_types(compute_device_type), *CLIENT_SIDE]))

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """As the inner collection has them."""
        return self._ebc_sharder.compute_kernels(sharding_type, compute_device_type)

    @property
    def module_type(self) -> type[CompressedEmbeddingBagCollection]:
        """What it shards."""
        return CompressedEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedCompressedEmbeddingBagCollection]:
        """What it makes."""
        return ShardedCompressedEmbeddingBagCollection


def get_sharders(
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders and ours, for ``DistributedModelParallel`` and the planner alike.

    Args:
        fused_params: for the sharders of plain and compressed ``EmbeddingBagCollection``s.
        qcomm_codecs_registry: for the same two.

    Example:
        >>> [type(sharder).__name__ for sharder in get_sharders()][0]
        'CompressedEmbeddingBagCollectionSharder'
    """
    ours = CompressedEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    plain = EmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    others = [sharder for sharder in get_default_sharders() if sharder.module_type is not plain.module_type]
    return [cast(ModuleSharder[nn.Module], sharder) for sharder in (ours, plain, *others)]
