"""TorchRec's DLRM over compressed tables, sharded by TorchRec's planner, with its optimizers."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.optim.optimizer import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cce_torchrec import CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig
from dlrm_example.config import TrainConfig
from dlrm_example.data import DatasetInfo
from dlrm_example.distributed import World
from dlrm_example.plan import make_plan


def build_model(tables: list[CompressedEmbeddingBagConfig], info: DatasetInfo, config: TrainConfig) -> DLRMTrain:
    """The model on the CPU, unsharded; its weights are a function of the global random state only.

    Codebooks carry an optimizer that FBGEMM runs inside the backward pass; the dense parameters of decode methods and
    projections are the dense layers' optimizer's.
    """
    collection = CompressedEmbeddingBagCollection(tables=list(tables), device=torch.device("cpu"))
    optimizer = _EMBEDDING_OPTIMIZERS[config.embedding_optimizer]
    settings = {"lr": config.learning_rate} | ({} if optimizer is torch.optim.SGD else {"eps": config.eps})
    apply_optimizer_in_backward(optimizer, collection.codebook_parameters(), settings)
    return DLRMTrain(_INTERACTIONS[config.interaction_type](collection, len(info.dense_names), config))


def collection_of(model: DLRMTrain) -> CompressedEmbeddingBagCollection:
    """The tables of an unsharded model."""
    collection = model.model.sparse_arch.embedding_bag_collection
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    return collection


def shard_model(model: DLRMTrain, config: TrainConfig, world: World) -> DistributedModelParallel:
    """Place the tables on the ranks as the planner says; weights are those of the unsharded model."""
    group = dist.group.WORLD
    assert group is not None
    show = config.print_sharding_plan
    plan, sharders = make_plan(model, collection_of(model), config.batch_size, group, show=show)
    return DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=world.device, plan=plan, sharders=sharders
    )


def build_optimizer(model: DistributedModelParallel, config: TrainConfig) -> CombinedOptimizer:
    """The optimizers that run inside the backward pass, of all tables, data-parallel ones included; and the dense layers'."""
    outside = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(outside, lambda parameters: _dense_optimizer(parameters, config))
    return CombinedOptimizer([("fused", model.fused_optimizer), ("dense", dense)])


def _dense_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    if config.adagrad:
        return torch.optim.Adagrad(parameters, lr=config.learning_rate, eps=config.eps)
    return torch.optim.SGD(parameters, lr=config.learning_rate)


def _original(collection: nn.Module, num_dense: int, config: TrainConfig) -> DLRM:
    return DLRM(
        embedding_bag_collection=collection,
        dense_in_features=num_dense,
        dense_arch_layer_sizes=list(config.dense_arch_layer_sizes),
        over_arch_layer_sizes=list(config.over_arch_layer_sizes),
    )


def _dcn(collection: nn.Module, num_dense: int, config: TrainConfig) -> DLRM:
    return DLRM_DCN(
        embedding_bag_collection=collection,
        dense_in_features=num_dense,
        dense_arch_layer_sizes=list(config.dense_arch_layer_sizes),
        over_arch_layer_sizes=list(config.over_arch_layer_sizes),
        dcn_num_layers=config.dcn_num_layers,
        dcn_low_rank_dim=config.dcn_low_rank_dim,
    )


def _projection(collection: nn.Module, num_dense: int, config: TrainConfig) -> DLRM:
    return DLRM_Projection(
        embedding_bag_collection=collection,
        dense_in_features=num_dense,
        dense_arch_layer_sizes=list(config.dense_arch_layer_sizes),
        over_arch_layer_sizes=list(config.over_arch_layer_sizes),
        interaction_branch1_layer_sizes=list(config.interaction_branch1_layer_sizes),
        interaction_branch2_layer_sizes=list(config.interaction_branch2_layer_sizes),
    )


_EMBEDDING_OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
_INTERACTIONS: Mapping[str, Callable[[nn.Module, int, TrainConfig], DLRM]] = {
    "original": _original,
    "dcn": _dcn,
    "projection": _projection,
}
