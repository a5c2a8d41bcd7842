"""One re-clustering of CCE on circular memory: from memories and offsets to new ones, nothing changed yet.

    x_i(v) = where window(h_i(v)) + window'(h'_i(v)) wants to be   all columns i of all ids v, see gradients.py
    memory <- K-means centroids of all x_i, side by side           k = M div W windows, fitted on a sample
    h_i(v) <- argmin_o |x_i(v) - window(o)|^2                      exact, over all M offsets
    helper[m] <- mean of the elements of x_i(v) - window(h_i(v)) whose helper windows read cell m, with a fresh hash h'_i

Each rank decodes and assigns its own block of ids; only sums, and at the end the offsets, travel.

Shapes: V ids, N ids of a batch, C columns, W cells a window, P points (ids times columns), M cells of a memory, S
optimizer-state values a cell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from cce_torchrec.hashing import derive_seed, hash_rows
from cce_torchrec.methods.cce_robe import CCERobeDecoder
from cce_torchrec.methods.flat_memory import read_windows
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.gradients import Targets, gather_sums, targets_from
from cce_torchrec.recluster.kmeans import kmeans
from cce_torchrec.recluster.nearest import assign_nearest
from cce_torchrec.recluster.stores import DenseStore
from cce_torchrec.recluster.vocabulary import (
    Block,
    check_finite,
    gather_assignments,
    id_weights,
    moved_fraction,
    moved_sample,
    sample,
)
from cce_torchrec.sums_by_id import SumsById

_WINDOWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class WindowsState:
    """All that one table is made of, whole on every rank; main memory first, helper second.

    Attributes:
        name: of the logical table.
        decoder: offsets and hashes.
        memories: [M] and [M'], float32.
        optimizer_state: [M, S] and [M', S], float32; S may be 0.
        weights_V: importance of each id, or ``None`` for 1.
        gradients: recorded on this rank, or ``None`` where nothing was.
    """

    name: str
    decoder: CCERobeDecoder
    memories: tuple[Tensor, Tensor]
    optimizer_state: tuple[Tensor, Tensor]
    weights_V: Tensor | None
    gradients: SumsById | None

    @classmethod
    def read(
        cls,
        name: str,
        decoder: CCERobeDecoder,
        optimizer: Optimizer | None,
        weights_V: Tensor | None,
        gradients: SumsById | None,
        config: ReclusterConfig,
    ) -> "WindowsState":
        """Copy what there is; optimizer state only where it is to be carried."""
        main, helper = stores(decoder, optimizer)
        memories = (main.read(), helper.read())
        if config.optimizer_state == "carry":
            states = (main.read_optimizer(), helper.read_optimizer())
        else:
            states = (memories[0].new_zeros(len(memories[0]), 0), memories[1].new_zeros(len(memories[1]), 0))
        return cls(
            name=name,
            decoder=decoder,
            memories=memories,
            optimizer_state=states,
            weights_V=weights_V,
            gradients=gradients,
        )

    def decode(self, ids_N: Tensor) -> Tensor:
        """The vectors of some ids, all columns side by side: [N, C * W]."""
        decoder, (main_M, helper_M) = self.decoder, self.memories
        vectors_NCW = read_windows(main_M, decoder.main_offsets(ids_N), decoder.width)
        vectors_NCW += read_windows(helper_M, decoder.helper_offsets(ids_N), decoder.width)
        return vectors_NCW.flatten(1)


@dataclass(frozen=True, kw_only=True)
class NewWindows:
    """What replaces a :class:`WindowsState`, and how good it is."""

    offsets: Tensor
    helper_coefficients: Tensor
    memories: tuple[Tensor, Tensor]
    optimizer_state: tuple[Tensor, Tensor]
    relative_squared_error: float
    moved_fraction: float
    empty_clusters: int

    def commit(self, decoder: CCERobeDecoder, optimizer: Optimizer | None) -> bool:
        """Put it in place; returns whether optimizer state that we do not know of is stale now."""
        both = stores(decoder, optimizer)
        for store, memory_M, state_MS in zip(both, self.memories, self.optimizer_state, strict=True):
            store.write(memory_M)
            store.write_optimizer(state_MS)
        decoder.offsets.copy_(self.offsets)
        decoder.helper_coefficients.copy_(self.helper_coefficients)
        decoder.version += 1
        return any(store.trained_elsewhere() for store in both)


def stores(decoder: CCERobeDecoder, optimizer: Optimizer | None) -> tuple[DenseStore, DenseStore]:
    """Of the main memory and of the helper."""
    return DenseStore(decoder.memory, optimizer), DenseStore(decoder.helper, optimizer)


def recluster_windows(
    state: WindowsState, *, seed: int, config: ReclusterConfig, collectives: Collectives
) -> NewWindows:
    """Cluster one table; collective, and the same on every rank up to rounding whatever their number.

    Raises:
        ValueError: on every rank, where weights are not finite.
    """
    decoder = state.decoder
    for part, memory_M in zip(("the memory", "the helper memory"), state.memories, strict=True):
        check_finite(state.name, part, memory_M, decoder.width)
    num_ids, num_cells = decoder.num_embeddings, len(state.memories[0])
    block = Block.of_rank(num_ids, config.decode_batch_size, state.memories[0].device, collectives)
    decode = state.decode if int(decoder.version) == 0 else None
    recorded = gather_sums(state.gradients, block, collectives)
    targets = targets_from(recorded, decode, config, block.device, collectives)
    memory_M = _fit_memory(state, targets, block, derive_seed(seed, state.name), config, collectives)
    coefficients = decoder.draw_helper_coefficients(int(decoder.version) + 1, seed).to(block.device)
    sums = _Sums(state, targets, memory_M, coefficients)
    offsets = torch.empty(
        block.stop - block.start, decoder.num_columns, dtype=decoder.offsets.dtype, device=block.device
    )
    for ids_N in block.batches():
        offsets[ids_N[0] - block.start : ids_N[-1] + 1 - block.start] = sums.add(ids_N)
    sums.reduce(collectives)
    ids_N = moved_sample(num_ids, block)
    after_NC = offsets[ids_N - block.start]
    helper_M = sums.helper()
    return NewWindows(
        offsets=gather_assignments(offsets, collectives),
        helper_coefficients=coefficients,
        memories=(memory_M, helper_M.float()),
        optimizer_state=sums.optimizer_state(),
        relative_squared_error=sums.relative_squared_error(helper_M),
        moved_fraction=moved_fraction(decoder.main_offsets(ids_N), after_NC, num_cells, collectives),
        empty_clusters=sums.empty_clusters(),
    )


def nearest_windows(points_PW: Tensor, memory_M: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the M windows of a circular memory, exactly; the lowest offset among equals.

    By matrix products against a bounded number of windows at a time: for windows of up to 64 cells, two to four times as
    fast on a CPU as correlation by FFT (see docs/recluster.md).

    Args:
        points_PW: [P, W] float32.
        memory_M: [M] float32, M at least W.

    Returns:
        The offset, int64 [P], and the squared distance, [P].

    Example:
        >>> nearest_windows(torch.tensor([[3.0, 0.0]]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
        (tensor([3]), tensor([0.]))
    """
    width = points_PW.shape[1]
    unrolled = torch.cat([memory_M, memory_M[: width - 1]])
    offset_P = torch.zeros(len(points_PW), dtype=torch.int64, device=points_PW.device)
    distance_P = torch.full((len(points_PW),), torch.inf, device=points_PW.device)
    for start in range(0, len(memory_M), _WINDOWS_AT_ONCE):
        cells = unrolled[start : start + _WINDOWS_AT_ONCE + width - 1]
        found_P, at_P = assign_nearest(points_PW, cells.unfold(0, width, 1))
        is_nearer_P = at_P < distance_P
        offset_P = torch.where(is_nearer_P, found_P + start, offset_P)
        distance_P = torch.where(is_nearer_P, at_P, distance_P)
    return offset_P, distance_P


def cells_of(offsets_NC: Tensor, width: int, num_cells: int) -> Tensor:
    """The cells of windows, element by element of the batch: [N * C * W]."""
    cells = offsets_NC[..., None] + torch.arange(width, device=offsets_NC.device)
    return cells.remainder_(num_cells).flatten()


def _vectors(state: WindowsState, targets: Targets | None, ids_N: Tensor) -> Tensor:
    """The column vectors to cluster of some ids, what they decode to or where they want to be: [N * C, W]."""
    vectors_ND = state.decode(ids_N)
    if targets is not None:
        vectors_ND = targets(ids_N, vectors_ND, slice(None))
    return vectors_ND.view(-1, state.decoder.width)


def _fit_memory(
    state: WindowsState,
    targets: Targets | None,
    block: Block,
    seed: int,
    config: ReclusterConfig,
    collectives: Collectives,
) -> Tensor:
    """K-means on a sample of all columns together, the centroids side by side: [M]; 0 in the cells that are left over."""
    decoder, memory_M = state.decoder, torch.zeros_like(state.memories[0])
    num_windows, columns = len(memory_M) // decoder.width, decoder.num_columns
    size = -(-config.points_per_centroid * num_windows // columns)
    ids_N, weights_N = sample(
        state.weights_V, decoder.num_embeddings, block, size, derive_seed(seed, "sample"), collectives
    )
    points = [_vectors(state, targets, batch_N) for batch_N in ids_N.split(config.decode_batch_size)]
    point_ids_NC = ids_N[:, None] * columns + torch.arange(columns, device=block.device)
    result = kmeans(
        torch.cat([memory_M.new_empty(0, decoder.width), *points]),
        num_windows,
        seed=derive_seed(seed, "windows"),
        point_ids_N=point_ids_NC.view(-1),
        weights_N=weights_N.repeat_interleave(columns),
        num_iterations=config.num_iterations,
        tolerance=config.tolerance,
        collectives=collectives,
    )
    memory_M[: result.centroids_KD.numel()] = result.centroids_KD.flatten()
    return memory_M


class _Sums:
    """What is added up while the ids go by, in float64; main memory first, helper second."""

    def __init__(
        self, state: WindowsState, targets: Targets | None, memory_M: Tensor, helper_coefficients: Tensor
    ) -> None:
        self._state, self._targets = state, targets
        self._memory, self._helper_coefficients = memory_M, helper_coefficients
        self._width = state.decoder.width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=memory_M.device)

        sizes = [len(memory) for memory in state.memories]
        self._energy = zeros(2)  # sum of |x|^2, sum of |x - window|^2
        self._starts = zeros(sizes[0])  # columns of ids whose main window starts at a cell
        self._mass = [zeros(size) for size in sizes]  # weight of the elements that read a cell
        self._residual = zeros(sizes[1])
        self._optimizer = [zeros(*old_MS.shape) for old_MS in state.optimizer_state]

    def add(self, ids_N: Tensor) -> Tensor:
        """Assign a batch of ids and add them up; returns their offsets [N, C]."""
        decoder = self._state.decoder
        points_PW = _vectors(self._state, self._targets, ids_N)
        offset_P, distance_P = nearest_windows(points_PW, self._memory)
        main_NC = offset_P.view(len(ids_N), -1)
        helper_NC = hash_rows(ids_N, self._helper_coefficients, len(self._residual)).T
        weights_P = id_weights(self._state.weights_V, ids_N).repeat_interleave(decoder.num_columns)
        weights_E = weights_P.repeat_interleave(self._width)
        self._energy[0] += points_PW.double().square().sum(dim=1) @ weights_P
        self._energy[1] += distance_P.double() @ weights_P
        self._starts.index_add_(0, offset_P, torch.ones_like(weights_P))
        residual_PW = points_PW - read_windows(self._memory, main_NC, self._width).flatten(0, 1)
        old = (decoder.main_offsets(ids_N), decoder.helper_offsets(ids_N))
        for number, (new_NC, old_NC) in enumerate(zip((main_NC, helper_NC), old, strict=True)):
            num_cells, old_state_MS = len(self._mass[number]), self._state.optimizer_state[number]
            cells_E = cells_of(new_NC, self._width, num_cells)
            self._mass[number].index_add_(0, cells_E, weights_E)
            if number == 1:
                self._residual.index_add_(0, cells_E, residual_PW.double().flatten() * weights_E)
            if old_state_MS.shape[1]:
                old_ES = old_state_MS[cells_of(old_NC, self._width, num_cells)].double()
                self._optimizer[number].index_add_(0, cells_E, old_ES * weights_E[:, None])
        return main_NC

    def reduce(self, collectives: Collectives) -> None:
        """Add up over ranks; one collective."""
        parts = [self._energy, self._starts, *self._mass, self._residual, *self._optimizer]
        total = collectives.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
        for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def helper(self) -> Tensor:
        """The mean residual of each helper cell, float64 [M']; 0 where no element reads it."""
        return torch.where(self._mass[1] > 0, self._residual / self._mass[1], 0)

    def optimizer_state(self) -> tuple[Tensor, Tensor]:
        """The mean old state over the elements that read each new cell; 0 for cells that none reads."""
        main_MS, helper_MS = (
            torch.where(mass_M[:, None] > 0, total_MS / mass_M[:, None], 0).float()
            for total_MS, mass_M in zip(self._optimizer, self._mass, strict=True)
        )
        return main_MS, helper_MS

    def relative_squared_error(self, helper_M: Tensor) -> float:
        """Of the decoded vectors; the helper means take their own energy out of the residual's."""
        before, residual = self._energy.tolist()
        residual -= float(helper_M.square() @ self._mass[1])
        return max(residual, 0.0) / before if before > 0 else 0.0

    def empty_clusters(self) -> int:
        """Centroids at whose cells no id's window starts."""
        num_windows = len(self._memory) // self._width
        return int((self._starts[: num_windows * self._width : self._width] == 0).sum())
