"""The sharder: what makes ``DistributedModelParallel`` and the planner know compressed collections."""

from typing import Any, cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import QuantizedCommCodecs
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv, ShardingType

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.distributed.groups import CLIENT_SIDE
from cce_torchrec.distributed.replicated import requested_optimizers
from cce_torchrec.distributed.sharded_collection import ShardedCompressedEmbeddingBagCollection
from cce_torchrec.methods import Column


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
            ValueError: where there is nothing to shard, a table is missing in the plan, a codebook is too narrow for FBGEMM,
                or the plan asks for a fused kernel under data-parallel, a dense one that would leave an optimizer out, or
                shards without rows.
        """
        device = torch.device("cpu") if device is None else device
        if not module.lowered_tables:
            names = [table.name for table in module.decoded_tables]
            raise ValueError(
                f"The collection has decode tables only ({names}), which are dense: leave it out of the plan, as TorchRec's "
                "planner does, and DistributedModelParallel replicates it."
            )
        missing = [name for name in self.shardable_parameters(module) if name not in params]
        if missing:
            raise ValueError(
                f"The sharding plan has no entry for {missing} (it has {list(params)}): plan with a planner that was "
                "given this sharder, or add them. Column i of a table t is the physical table t:i."
            )
        requested = requested_optimizers(module._embedding_bag_collection)
        fused = {"optimizer", "learning_rate"} & set(self.fused_params or {})
        for name in self.shardable_parameters(module):
            _check_kernel(
                name, params[name], "apply_optimizer_in_backward" if name in requested else ", ".join(sorted(fused))
            )
        for table in module.lowered_tables:
            for name, column in zip(table.physical_names, table.row_map.columns, strict=True):
                _check_placement(table.name, name, column, params[name], device)
        mode: BoundsCheckMode | None = (self.fused_params or {}).get("bounds_check_mode")
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


def _check_kernel(physical_table: str, sharding: ParameterSharding, asked: str) -> None:
    """Raise where TorchRec would leave out, without a word, an optimizer that was asked for."""
    replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    if asked and not replicated and sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value:
        raise ValueError(
            f"{physical_table!r} is planned {sharding.sharding_type!r} with the 'dense' kernel, which ignores {asked}: plan "
            "it with compute_kernel='fused' (construct_module_sharding_plan chooses 'dense' where none is given), or train "
            "it with a dense optimizer."
        )


def _check_placement(
    table: str, physical_table: str, column: Column, sharding: ParameterSharding, device: torch.device
) -> None:
    """Raise where TorchRec would fail obscurely, or train something wrong."""
    replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    if replicated and sharding.compute_kernel != EmbeddingComputeKernel.DENSE.value:
        raise ValueError(
            f"{physical_table!r} is planned data_parallel with the {sharding.compute_kernel!r} kernel; TorchRec replicates "
            "with 'dense' only (an optimizer applied in backward works there too)."
        )
    shards = [] if replicated or sharding.sharding_spec is None else sharding.sharding_spec.shards
    widths = {shard.shard_sizes[1] for shard in shards} or {column.dim}
    if any(width % 4 for width in widths):
        raise ValueError(
            f"{physical_table!r} would have shards of {sorted(widths)} dims, and FBGEMM needs multiples of 4: give table "
            f"{table!r} fewer columns (num_columns) or fewer column shards."
        )
    empty = [shard for shard in shards if shard.shard_sizes[0] == 0]
    if empty and device.type == "cpu":
        raise ValueError(
            f"{physical_table!r} has too few rows ({column.num_rows}) for {len(shards)} row-wise shards: {len(empty)} would "
            "be empty, which FBGEMM's CPU kernels train wrongly. Place it data_parallel or table_wise."
        )


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
