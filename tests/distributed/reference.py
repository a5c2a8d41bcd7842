"""What sharded training is compared with: the unsharded collection, trained on the batches of all ranks at once.

The row-wise Adagrad is written out here, once a column shard since each shard of a table keeps a sum of its own:

    s_r <- s_r + mean_d(g_rd^2),    w_r <- w_r - lr * g_r / (sqrt(s_r) + eps)
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor, KeyedTensor

from tests.distributed.models import EPS, LEARNING_RATE


def loss_of(pooled: KeyedTensor) -> Tensor:
    """A loss in which every number of every feature matters differently."""
    values = torch.cat([pooled[key] for key in sorted(pooled.keys())], dim=1)
    return (values.tanh() * torch.linspace(0.5, 1.5, values.numel()).view_as(values)).sum()


class RowwiseAdagrad:
    """Row-wise Adagrad over the codebooks of a model, each cut in a number of column shards."""

    def __init__(self, model: nn.Module, column_shards: dict[str, int]) -> None:
        self._weights = codebooks(model)
        self._shards = {name: column_shards.get(name, 1) for name in self._weights}
        self.sums = {name: torch.zeros(self._shards[name] * len(w)) for name, w in self._weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        for name, weight in self._weights.items():
            assert weight.grad is not None
            count = self._shards[name]
            parts = zip(
                weight.chunk(count, 1), weight.grad.chunk(count, 1), self.sums[name].view(count, -1), strict=True
            )
            for weight_RD, grad_RD, sum_R in parts:
                sum_R += grad_RD.square().mean(1)
                weight_RD -= LEARNING_RATE * grad_RD / (sum_R.sqrt() + EPS)[:, None]


def codebooks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's codebooks by physical table, sharded or not."""
    return {table_of(name): parameter for name, parameter in model.named_parameters() if "embedding_bags." in name}


def train_step(model: nn.Module, batches: Sequence[KeyedJaggedTensor]) -> list[KeyedTensor]:
    """Gradients of the mean loss over the batches of all ranks; returns what the forward gave for each."""
    model.zero_grad()
    pooled = [model(features) for features in batches]
    sum(loss_of(values) / len(batches) for values in pooled).backward()  # type: ignore[union-attr]
    return pooled


def pieces_of(value: Tensor | ShardedTensor) -> list[tuple[list[int], Tensor]]:
    """The shards of a tensor on this rank, each with its offsets."""
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, shard.tensor.detach().clone()) for shard in value.local_shards()]
    return [([0] * value.dim(), value.detach().clone())]


def gather_whole(local: dict[str, list[tuple[list[int], Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks, which name them in any order or not at all; collective.

    Pieces either tile a tensor or are replicas, which must be equal bit by bit.
    """
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    names = sorted({name for of_rank in gathered for name in of_rank})
    return {name: assemble(name, [piece for of_rank in gathered for piece in of_rank.get(name, [])]) for name in names}


def assemble(name: str, pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    """One tensor from its pieces."""
    ends = [[offset + size for offset, size in zip(at, piece.shape, strict=True)] for at, piece in pieces]
    whole = torch.zeros([max(end) for end in zip(*ends, strict=True)], dtype=pieces[0][1].dtype)
    times = torch.zeros(whole.shape, dtype=torch.int64)
    for (offsets, piece), end in zip(pieces, ends, strict=True):
        at = tuple(slice(start, stop) for start, stop in zip(offsets, end, strict=True))
        same = (whole[at] == piece) | (whole[at].isnan() & piece.isnan())
        assert bool(((times[at] == 0) | same).all()), f"the replicas of {name} differ"
        whole[at] = piece
        times[at] += 1
    assert whole.numel() == 0 or times.min() == times.max() >= 1, f"the shards of {name} do not tile it"
    return whole


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, every tensor whole; collective."""
    return gather_whole({name: pieces_of(value) for name, value in model.state_dict().items()})


def table_of(key: str) -> str:
    """The physical table in the name of a parameter."""
    return key.removesuffix(".weight").rpartition(".")[2]


def whole_fused_sums(dmp: nn.Module) -> dict[str, Tensor]:
    """The sums of the fused row-wise Adagrad by physical table, those of column shards end to end; collective."""
    states = dmp.fused_optimizer.state_dict()["state"]
    return gather_whole({table_of(key): pieces_of(value) for key, state in states.items() for value in state.values()})


def whole_optimizer_state(dmp: nn.Module, optimizer: torch.optim.Optimizer | None, kind: str) -> dict[str, Tensor]:
    """One kind of an optimizer's state by physical table, for tables that no fused kernel trains; collective.

    [R, D] where the state has a number a weight; where it has one a row, those of column shards end to end.
    """
    local = {}
    weights = {table_of(key): value for key, value in dmp.state_dict().items() if "embedding_bags." in key}
    for name, parameter in codebooks(dmp).items():
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        if kind not in state:
            continue
        shards = pieces_of(weights[name])  # they lie one after another in the parameter
        numbers = state[kind].reshape(-1)
        if len(numbers) == parameter.numel():
            parts = numbers.split([piece.numel() for _, piece in shards])
            local[name] = [(at, part.view(piece.shape)) for (at, piece), part in zip(shards, parts, strict=True)]
        else:
            parts = numbers.split([len(piece) for _, piece in shards])
            num_rows = weights[name].size()[0]
            starts = [[column // piece.shape[1] * num_rows + row] for (row, column), piece in shards]
            local[name] = list(zip(starts, parts, strict=True))
    return gather_whole(local)


def dense_pooled(collection: nn.Module, features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """The oracle of the forward: every bag added up in a loop from the full tables."""
    result = {}
    for table in collection.lowered_tables:
        weight_VD = collection.dense_weight(table.name)
        for feature, key in zip(table.config.feature_names, table.embedding_names, strict=True):
            jagged = features[feature]
            weights = jagged.weights_or_none()
            bags = []
            for start, stop in zip(jagged.offsets()[:-1].tolist(), jagged.offsets()[1:].tolist(), strict=True):
                scale = torch.ones(stop - start) if weights is None else weights[start:stop]
                bag = (weight_VD[jagged.values()[start:stop]] * scale[:, None]).sum(0)
                bags.append(bag / max(stop - start, 1) if table.is_mean else bag)
            result[key] = torch.stack(bags)
    return result
