"""Reading and writing what a re-clustering needs, wherever it is: codebooks and the optimizer state of their rows.

Reading gathers the shards of every rank, so that each rank holds whole codebooks; writing keeps the local part.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType

from cce_torchrec.recluster.collectives import Collectives, LocalCollectives


class Piece(NamedTuple):
    """A local part of a matrix: rows from ``row``, columns from ``col``."""

    tensor: Tensor
    row: int
    col: int
    initial: float = 0.0


def local_pieces(value: Any) -> list[Piece]:
    """The local parts of a plain, sharded or distributed tensor."""
    if isinstance(value, ShardedTensor):
        return [Piece(shard.tensor, *_two(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    if isinstance(value, DTensor):
        shards: Any = value.to_local()
        return [
            Piece(tensor, *_two(offset))
            for tensor, offset in zip(shards.local_shards(), shards.local_offsets(), strict=True)
        ]
    return [Piece(value, 0, 0)]


def _two(offsets: Iterable[int]) -> tuple[int, int]:
    row, col = (*offsets, 0)[:2]
    return row, col


def assemble(pieces: list[Piece], collectives: Collectives, device: torch.device) -> Tensor:
    """All-gather the pieces of every rank into the whole matrix, in float32; [0, 0] where there are none."""
    pieces = [piece for piece in pieces if piece.tensor.numel()]
    places = [[piece.row, piece.col, *piece.tensor.shape] for piece in pieces]
    flat = [piece.tensor.detach().float().reshape(-1).to(device) for piece in pieces]
    all_places = collectives.all_gather_rows(
        torch.tensor(places, dtype=torch.int64, device=device).view(-1, 4)
    ).tolist()
    numbers = collectives.all_gather_rows(torch.cat([torch.empty(0, device=device), *flat]))
    rows = max((row + height for row, _, height, _ in all_places), default=0)
    cols = max((col + width for _, col, _, width in all_places), default=0)
    whole = torch.zeros(rows, cols, device=device)
    position = 0
    for row, col, height, width in all_places:
        part = numbers[position : position + height * width].view(height, width)
        whole[row : row + height, col : col + width] = part
        position += height * width
    return whole


class Store:
    """The codebooks of one collection, sharded or not, and the optimizer state of their rows.

    Args:
        collection: whose inner collection holds the codebooks.
        optimizer: the one that trains what no fused kernel trains; may be ``None``.
        collectives: of the ranks that share the collection.
    """

    def __init__(self, collection: nn.Module, optimizer: Optimizer | None, collectives: Collectives) -> None:
        inner: Any = collection._embedding_bag_collection
        self._inner = inner
        self._dims = {config.name: config.embedding_dim for config in inner._embedding_bag_configs}
        self._weights = inner.state_dict()  # flushes caches; its tensors are the parameters themselves
        self._is_sharded = isinstance(inner, ShardedEmbeddingBagCollection)
        self._fused = inner.fused_optimizer.state_dict()["state"] if self._is_sharded else {}
        self._optimizer = optimizer
        self._external = optimizer.state if optimizer is not None else {}
        self._all_ranks = collectives

    def _collectives(self, table: str) -> Collectives:
        """Of the ranks that hold parts of a physical table; a replicated one is whole everywhere."""
        if not self._is_sharded:
            return LocalCollectives()
        replicated = self._inner.module_sharding_plan[table].sharding_type == ShardingType.DATA_PARALLEL.value
        return LocalCollectives() if replicated else self._all_ranks

    def _pieces(self, table: str) -> list[Piece]:
        return local_pieces(self._weights[_key(table)])

    def _device(self, table: str) -> torch.device:
        return self._inner.embedding_bags[table].weight.device

    def read(self, table: str) -> Tensor:
        """The whole codebook of a physical table: [R, D] float32, a copy; collective."""
        return assemble(self._pieces(table), self._collectives(table), self._device(table))

    def write(self, codebooks: dict[str, Tensor]) -> None:
        """Replace whole codebooks, by physical table."""
        self._inner.load_state_dict({_key(table): weight for table, weight in codebooks.items()}, strict=False)

    def _states(self, table: str) -> dict[str, Any]:
        """The kinds of optimizer state of a table by name, as far as they are on this rank."""
        weight = self._inner.embedding_bags[table].weight
        return self._fused.get(_key(table)) or self._external.get(weight) or _in_backward_state(weight)

    def _state_pieces(self, table: str, num_rows: int) -> list[Piece]:
        """Views of the optimizer state of this rank's rows, each kind in D columns of its own (a row-wise one in fewer)."""
        states = self._states(table)
        dim = self._dims[table]
        weight = self._inner.embedding_bags[table].weight
        initial = _initial_sum(weight, self._optimizer)
        return [
            Piece(part.tensor, part.row, index * dim + part.col, initial if name == "sum" else 0.0)
            for index, name in enumerate(sorted(states))
            for part in _rows_of_state(states[name], self._pieces(table), num_rows)
        ]

    def read_optimizer(self, table: str, num_rows: int) -> Tensor:
        """The optimizer state of all rows: [R, S] float32, S = 0 where there is none; collective."""
        state_RS = assemble(self._state_pieces(table, num_rows), self._collectives(table), self._device(table))
        return state_RS if state_RS.numel() else state_RS.new_zeros(num_rows, 0)

    def write_optimizer(self, table: str, state_RS: Tensor, num_rows: int) -> None:
        """Replace the optimizer state of all rows; S = 0 resets it, step counts included."""
        for piece in self._state_pieces(table, num_rows):
            height, width = piece.tensor.shape
            if state_RS.shape[1]:
                piece.tensor.copy_(state_RS[piece.row : piece.row + height, piece.col : piece.col + width])
            else:
                piece.tensor.fill_(piece.initial)
        if not state_RS.shape[1]:
            _reset_counts(self._states(table))

    def trained_elsewhere(self, table: str) -> bool:
        """Whether a table was trained by an optimizer that we were not given."""
        if self._is_sharded and self._inner.module_sharding_plan[table].compute_kernel != "dense":
            return False
        weight = self._inner.embedding_bags[table].weight
        return weight.grad is not None and not self._states(table) and not _is_known(weight, self._optimizer)


class DenseStore:
    """A flat dense parameter, whole on every rank, and the optimizer state of its elements.

    Args:
        parameter: [M].
        optimizer: the one that trains it, unless one was applied in backward; may be ``None``.
    """

    def __init__(self, parameter: nn.Parameter, optimizer: Optimizer | None) -> None:
        self._parameter, self._optimizer = parameter, optimizer

    def read(self) -> Tensor:
        """The parameter in float32, a copy."""
        return self._parameter.detach().to(torch.float32, copy=True)

    def write(self, weight_M: Tensor) -> None:
        """Replace the parameter's numbers."""
        self._parameter.detach().copy_(weight_M)

    def _states(self) -> dict[str, Any]:
        external = self._optimizer.state.get(self._parameter) if self._optimizer is not None else None
        return external or _in_backward_state(self._parameter)

    def _state_parts(self) -> list[Piece]:
        """Views [M, 1] of the kinds of optimizer state that are kept by element."""
        states, initial = self._states(), _initial_sum(self._parameter, self._optimizer)
        column = Piece(self._parameter.detach().view(-1, 1), 0, 0)
        return [
            part._replace(initial=initial if name == "sum" else 0.0)
            for name in sorted(states)
            for part in _rows_of_state(states[name], [column], self._parameter.numel())
        ]

    def read_optimizer(self) -> Tensor:
        """The optimizer state of all elements: [M, S] float32, S = 0 where there is none."""
        kinds = [part.tensor.float() for part in self._state_parts()]
        return torch.cat([self.read().new_zeros(self._parameter.numel(), 0), *kinds], dim=1)

    def write_optimizer(self, state_MS: Tensor) -> None:
        """Replace the optimizer state of all elements; S = 0 resets it, step counts included."""
        for column, part in enumerate(self._state_parts()):
            if state_MS.shape[1]:
                part.tensor.copy_(state_MS[:, column : column + 1])
            else:
                part.tensor.fill_(part.initial)
        if not state_MS.shape[1]:
            _reset_counts(self._states())

    def trained_elsewhere(self) -> bool:
        """Whether it was trained by an optimizer that we were not given."""
        trained = self._parameter.grad is not None
        return trained and not self._states() and not _is_known(self._parameter, self._optimizer)


def _key(table: str) -> str:
    return f"embedding_bags.{table}.weight"


def _initial_sum(weight: nn.Parameter, optimizer: Optimizer | None) -> float:
    """Where Adagrad's sums start."""
    optimizers = [optimizer, *getattr(weight, "_in_backward_optimizers", [])]
    groups = [group for each in optimizers if each is not None for group in each.param_groups]
    values = [g.get("initial_accumulator_value", 0.0) for g in groups if any(p is weight for p in g["params"])]
    return values[0] if values else 0.0


def _is_known(weight: nn.Parameter, optimizer: Optimizer | None) -> bool:
    """Whether an optimizer that we were given trains it, or one in backward."""
    groups = optimizer.param_groups if optimizer is not None else []
    in_groups = any(parameter is weight for group in groups for parameter in group["params"])
    return in_groups or hasattr(weight, "_in_backward_optimizers")


def _reset_counts(states: dict[str, Any]) -> None:
    """Start step counts anew."""
    for value in states.values():
        if isinstance(value, Tensor) and not isinstance(value, ShardedTensor | DTensor) and value.dim() == 0:
            value.zero_()


def _in_backward_state(weight: nn.Parameter) -> dict[str, Any]:
    """The state of an optimizer that was applied in backward to an unsharded table; it has that one parameter."""
    merged: dict[str, Any] = {}
    for optimizer in getattr(weight, "_in_backward_optimizers", []):
        for state in optimizer.state.values():
            merged |= state
    return merged


def _rows_of_state(value: Any, weight_pieces: list[Piece], num_rows: int) -> list[Piece]:
    """Views [rows, width] of one kind of state; none where it is not kept by row (a step count).

    TorchRec lays the row-wise state of column shards end to end, so an offset of 1-D state is (column shard, row).
    """
    if isinstance(value, ShardedTensor | DTensor):
        parts = local_pieces(value)
        flat = [Piece(p.tensor.view(-1, 1), p.row % num_rows, p.row // num_rows) for p in parts if p.tensor.dim() == 1]
        return flat or [part for part in parts if part.tensor.dim() == 2]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return []
    # A plain tensor goes with a parameter in which the local shards of the table lie one after another.
    sizes = [piece.tensor.numel() for piece in weight_pieces]
    if value.numel() == sum(sizes):
        parts = value.view(-1).split(sizes)
        return [Piece(t.view(p.tensor.shape), p.row, p.col) for t, p in zip(parts, weight_pieces, strict=True)]
    rows = value.view(-1).split([len(piece.tensor) for piece in weight_pieces])
    return [
        Piece(t.view(-1, 1), p.row, p.col // max(p.tensor.shape[1], 1))
        for t, p in zip(rows, weight_pieces, strict=True)
    ]
