"""The storage of codebooks in a sharding plan, exact to the byte.

TorchRec's own estimate leaves out gradients of data-parallel tables, optimizers that are given by ``fused_params``, and all
but the first of the row-wise sums that column shards keep each.
"""

from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import optim
from torchrec import optim as torchrec_optim
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator, _calculate_storage_specific_sizes
from torchrec.distributed.planner.types import Shard, ShardingOption, Storage
from torchrec.distributed.types import ShardingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.planner.footprint import OptimizerName, optimizer_bytes

_NAMES: dict[Any, OptimizerName] = {
    optim.SGD: "sgd",
    torchrec_optim.SGD: "sgd",
    EmbOptimType.EXACT_SGD: "sgd",
    RowWiseAdagrad: "rowwise_adagrad",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
    optim.Adagrad: "adagrad",
    torchrec_optim.Adagrad: "adagrad",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    optim.Adam: "adam",
    torchrec_optim.Adam: "adam",
    EmbOptimType.ADAM: "adam",
}
_RESIDENT = (EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value)


class CompressedStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's storage estimator with exact bytes for the codebooks of compressed collections.

    A shard of r rows and d dims takes r * d * itemsize bytes, as much again for its gradient where it is data-parallel,
    and the optimizer's state: 4 bytes a row of each shard for row-wise Adagrad, 4 r d for Adagrad, 8 r d for Adam. The
    optimizer is the one that was applied in backward, else that of the sharder's ``fused_params``; others, which the planner
    cannot know, count nothing. What TorchRec adds for inputs and outputs stays; assignments are
    :class:`CompressedStorageReservation`'s. Same arguments as TorchRec's.

    Example:
        >>> from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
        >>> from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
        >>> from torchrec.distributed.planner.types import Topology
        >>> def make_enumerator(topology: Topology) -> EmbeddingEnumerator:
        ...     estimators = [EmbeddingPerfEstimator(topology), CompressedStorageEstimator(topology)]
        ...     return EmbeddingEnumerator(topology, batch_size=1024, estimator=estimators)
    """

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        """Set the storage of every shard."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            is_ours = isinstance(option.module[1], CompressedEmbeddingBagCollection)
            if is_ours and option.compute_kernel in _RESIDENT:
                fused_params = sharder_data_map[option.module_type_key].fused_params
                self._correct(option, _optimizer(option, fused_params))

    def _correct(self, option: ShardingOption, optimizer: OptimizerName | None) -> None:
        tensor = option.tensor
        theirs = _calculate_storage_specific_sizes(
            storage=tensor.numel() * tensor.element_size(),
            shape=tensor.shape,
            shard_sizes=[shard.size for shard in option.shards],
            sharding_type=option.sharding_type,
            optimizer_class=getattr(tensor, "_optimizer_classes", [None])[0],
        )
        on_device = self._topology.compute_device != "cpu"
        for shard, counted in zip(option.shards, theirs, strict=True):
            assert shard.storage is not None
            more = resident_bytes(option, shard, optimizer) - counted
            shard.storage = shard.storage + (
                Storage(hbm=more, ddr=0, ssd=0) if on_device else Storage(hbm=0, ddr=more, ssd=0)
            )


def resident_bytes(option: ShardingOption, shard: Shard, optimizer: OptimizerName | None) -> int:
    """The bytes of a shard's weights, gradient and optimizer state."""
    rows, dim = shard.size
    weight = rows * dim * option.tensor.element_size()
    copies = 2 if option.sharding_type == ShardingType.DATA_PARALLEL.value else 1
    return copies * weight + (0 if optimizer is None else optimizer_bytes(optimizer, rows, rows * dim))


def _optimizer(option: ShardingOption, fused_params: dict[str, Any]) -> OptimizerName | None:
    in_backward = getattr(option.tensor, "_optimizer_classes", [None])[0]
    if in_backward is None and option.compute_kernel == EmbeddingComputeKernel.FUSED.value:
        return _NAMES.get(fused_params.get("optimizer"))
    return _NAMES.get(in_backward)
