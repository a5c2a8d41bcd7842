"""The rows that ids are assigned, and where they are stored: for all ids, or for the warm ones.

    assigned(id) = decode(assignments[id])                                     every id has a slot
    assigned(id) = decode(assignments[slot]) if warm_ids[slot] = id            slots are the warm ids', in order
                   else h(id)                                                  a hash, row 0 once something was learned

Before anything is learned, assignments are blocks of consecutive ids or hashes, where not all ids have slots always hashes.
After that the ids without a slot, the cold ones, share a row: were they hashed, rows would be those of warm ids, too, which
they are not like.

An assignment is one of k rows that ids share, or, from k on, a row of the id's own: k + j of the j-th hot id. Encodings are
in encoding.py.

Shapes: V ids, N ids of a batch, A assignments an id, W numbers stored an id, S slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_coefficients, hash_rows
from cce_torchrec.methods.base import RowMap, check_bool, check_not_negative, check_positive, id_chunks
from cce_torchrec.methods.blocks import Assignments, blocks_of_ids, check_assignments
from cce_torchrec.methods.encoding import Encoding, PackedEncoding, PlainEncoding
from cce_torchrec.native.rows import Assigned

COLD_ROW = 0  # of cold ids, in every codebook, once something was learned
_NO_ID = -1  # in slots that no id has; below all ids, so that slots are sorted


def find_sorted(sorted_S: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each id among some sorted ones, at least one, and whether it is there (else the place is any)."""
    ids_N = ids_N.to(sorted_S.dtype)
    places_N = torch.searchsorted(sorted_S, ids_N).clamp_(max=len(sorted_S) - 1)
    return places_N, sorted_S[places_N] == ids_N


def heaviest(weights_N: Tensor, number: int, above: int) -> Tensor:
    """The places, in order, of the largest weights that are above a limit; of equal ones the first."""
    places = (weights_N > above).nonzero().view(-1)
    if number == 0 or len(places) <= number:
        return places[:number]
    least = weights_N.topk(number).values[-1]
    larger, equal = (weights_N > least).nonzero().view(-1), (weights_N == least).nonzero().view(-1)
    return torch.cat([larger, equal[: number - len(larger)]]).sort().values


@dataclass(frozen=True, kw_only=True)
class AssignmentStorage:
    """What is stored for which ids.

    Attributes:
        initial: what is stored before anything is learned.
        bit_packed: ceil(log2 k) bits an assignment instead of 1, 2 or 4 bytes.
        num_assigned_ids: how many ids have slots; ``None`` for all.
        min_id_count: how often an id must have been seen to get one of those.
        num_hot_ids: how many ids have rows of their own.
    """

    initial: Assignments = "hash"
    bit_packed: bool = False
    num_assigned_ids: int | None = None
    min_id_count: int = 1
    num_hot_ids: int = 0

    def __post_init__(self) -> None:
        check_assignments(initial_assignments=self.initial)
        check_bool(bit_packed=self.bit_packed)
        if self.num_assigned_ids is not None:
            check_positive(num_assigned_ids=self.num_assigned_ids)
        check_positive(min_id_count=self.min_id_count)
        if self.min_id_count > 1 and self.num_assigned_ids is None:
            raise ValueError(
                f"min_id_count={self.min_id_count} needs num_assigned_ids, for how many ids at most assignments are stored: "
                "without it all ids have them, however often they are seen."
            )
        check_not_negative(num_hot_ids=self.num_hot_ids)
        if self.num_assigned_ids is not None and self.num_hot_ids > self.num_assigned_ids:
            raise ValueError(
                f"num_assigned_ids={self.num_assigned_ids} is below num_hot_ids={self.num_hot_ids}: a row of its own is an "
                "assignment, too."
            )

    def sizes(self) -> dict[str, object]:
        """What differs from an integer an assignment for all ids, for the name of a table's layout."""
        plain = vars(AssignmentStorage())
        is_layout = ("bit_packed", "num_assigned_ids", "num_hot_ids")
        return {name: value for name, value in vars(self).items() if name in is_layout and value != plain[name]}


class AssignedRowMap(RowMap):
    """A row map that stores A rows an id, which can be learned.

    Buffers: ``assignments`` [V, W], of a block of ids after :meth:`keep_block`; or, where not all ids have slots,
    [S, W], beside ``warm_ids`` [S], sorted, int32 where that holds V, and ``main_coefficients`` int64 [1 + A].

    Args:
        storage: what is stored for which ids.
        num_values: k; assignments of ids that are not hot lie in [0, k).
        count: A.
        key: seed of the hash that assigns ids where nothing was learned.
        num_embeddings: V.
        device: of the buffers.
    """

    bounded = True
    assignments: Tensor
    warm_ids: Tensor | None
    main_coefficients: Tensor | None

    def __init__(
        self,
        storage: AssignmentStorage,
        num_values: int,
        count: int,
        key: tuple[object, ...],
        num_embeddings: int,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.first_id = num_embeddings, 0
        self.num_values, self.assignments_per_id = num_values, count
        self.num_codes = num_values + storage.num_hot_ids  # what an assignment may be
        self.storage, self._key = storage, key
        encoding = PackedEncoding if storage.bit_packed else PlainEncoding
        self.encoding: Encoding = encoding(self.num_codes, count)
        slots = self._num_slots()
        self.register_buffer(
            "assignments", torch.empty(slots, self.encoding.width, dtype=self.encoding.dtype, device=device)
        )
        is_hashed = storage.num_assigned_ids is not None
        warm_ids = torch.empty(slots, dtype=self._id_dtype(), device=device) if is_hashed else None
        coefficients = torch.empty(1 + count, dtype=torch.int64, device=device) if is_hashed else None
        self.register_buffer("warm_ids", warm_ids)
        self.register_buffer("main_coefficients", coefficients)

    @property
    def has_plain_assignments(self) -> bool:
        """Whether ``assignments`` are integers, [V, A], or of the ids from ``first_id`` on."""
        return self.warm_ids is None and not self.storage.bit_packed

    def _num_slots(self) -> int:
        most = self.storage.num_assigned_ids
        return self.num_embeddings if most is None else min(most, self.num_embeddings)

    def _id_dtype(self) -> torch.dtype:
        return torch.int32 if self.num_embeddings - 1 <= torch.iinfo(torch.int32).max else torch.int64

    def reset_assignments(self) -> None:
        """Give every id its block or hash, but the first, which are the hot ones: the start before anything is learned."""
        if self.warm_ids is not None:
            assert self.main_coefficients is not None
            self.main_coefficients.copy_(self._draw_coefficients(None))
            hot_H = self.choose_hot_ids(None)
            codes_HA = (self.num_values + hot_H)[:, None].expand(-1, self.assignments_per_id)
            self.put(self.encoding.encode(codes_HA), hot_H)
        elif self.assignments.device.type != "meta":
            self._start_from(self.first_id)

    def _draw_coefficients(self, device: torch.device | None) -> Tensor:
        return hash_coefficients(self.assignments_per_id, *self._key, "main", device=device)

    def _start_from(self, first_id: int) -> None:
        """Store what the ids from one on begin with."""
        coefficients = self._draw_coefficients(self.assignments.device)
        stored_NW = self.assignments[first_id - self.first_id :]
        for rows_N in id_chunks(len(stored_NW), stored_NW.device):
            ids_N = rows_N + first_id
            if self.storage.initial == "hash":
                shared_AN = hash_rows(ids_N, coefficients, self.num_values)
            else:
                shared_AN = blocks_of_ids(ids_N, self.num_embeddings, self.num_values, self.assignments_per_id)
            codes_AN = torch.where(ids_N < self.storage.num_hot_ids, self.num_values + ids_N, shared_AN)
            stored_NW[rows_N[0] : rows_N[-1] + 1] = self.encoding.encode(codes_AN.T)

    def keep_block(self, first_id: int, end: int, device: torch.device) -> None:
        """Hold the assignments of ids ``first_id .. end - 1`` only; other ids must not be asked for from then on."""
        assert self.warm_ids is None
        self.first_id = first_id
        if self.assignments.device.type == "meta":
            self.assignments = self.assignments.new_empty(end - first_id, self.encoding.width, device=device)
            for name, buffer in self.named_buffers():
                if buffer.device.type == "meta":
                    setattr(self, name, torch.empty_like(buffer, device=device))
            self.reset_parameters()
        else:
            self.assignments = self.assignments[first_id:end].to(device, copy=True)

    def stored_bytes(self) -> int:
        """Of all ranks together where each holds a block."""
        elsewhere = self._num_slots() - len(self.assignments)
        return super().stored_bytes() + elsewhere * self.encoding.width * self.encoding.dtype.itemsize

    def cold(self, ids_N: Tensor) -> Tensor:
        """The assignments of ids that have no slot: int64 [A, N]."""
        assert self.main_coefficients is not None
        return hash_rows(ids_N, self.main_coefficients, self.num_values)

    def assigned(self, ids_N: Tensor) -> Tensor:
        """The assignments of ids, which are of this rank's block where there are blocks: [N, A]."""
        if self.warm_ids is not None:
            slots_N, is_warm_N = find_sorted(self.warm_ids, ids_N)
            learned_NA = self.encoding.decode(torch.index_select(self.assignments, 0, slots_N))
            return torch.where(is_warm_N[:, None], learned_NA, self.cold(ids_N).T.to(learned_NA.dtype))
        local_N = ids_N - self.first_id if self.first_id else ids_N
        return self.encoding.decode(torch.index_select(self.assignments, 0, local_N))  # twice as fast as indexing

    def assigned_here(self) -> Assigned:
        """What native kernels read, in place of :meth:`assigned`."""
        return Assigned(
            assignments=self.assignments,
            bits=self.encoding.bits,
            columns=self.assignments_per_id,
            first_id=self.first_id,
            num_ids=len(self.assignments) if self.warm_ids is None else self.num_embeddings,
            warm_ids=self.warm_ids,
            coefficients=self.main_coefficients,
            num_values=self.num_values,
        )

    def choose(self, weights_N: Tensor) -> Tensor:
        """Which of N ids in rising order are to have slots, where not all have them: their places, in order.

        Args:
            weights_N: how often each was seen, for one. The largest weights above ``min_id_count - 1`` are taken, of equal
                ones the first.
        """
        return heaviest(weights_N, len(self.assignments), self.storage.min_id_count - 1)

    def choose_hot_ids(self, weights_V: Tensor | None) -> Tensor:
        """Which ids are to have rows of their own, in order: the first ids, or those of the largest weights above 0."""
        number = min(self.storage.num_hot_ids, self.num_embeddings)
        if weights_V is None:
            return torch.arange(number, device=self.assignments.device)
        return heaviest(weights_V, number, 0).to(self.assignments.device)

    def put(self, stored_NW: Tensor, ids_N: Tensor | None) -> None:
        """Replace what is stored: of all ids of this rank, or of the chosen ones, sorted, which are the warm ones then."""
        if self.warm_ids is None:
            self.assignments.copy_(stored_NW)
            return
        assert ids_N is not None
        free = len(self.warm_ids) - len(ids_N)
        self.warm_ids[:free], self.warm_ids[free:] = _NO_ID, ids_N
        self.assignments[:free], self.assignments[free:] = 0, stored_NW

    def share_cold_row(self) -> None:
        """Assign all ids that have no slot row 0 of every codebook, from now on."""
        if self.main_coefficients is not None:
            self.main_coefficients[1:] = 0  # the hash whose every value is COLD_ROW, so that no kernel need know of it

    @property
    def can_grow(self) -> bool:
        return True

    def grow(self, num_embeddings: int) -> None:
        if self.warm_ids is None:
            self.hold(self.assignments, 0, num_embeddings, num_embeddings)
            return
        self.num_embeddings = num_embeddings
        free = self._num_slots() - len(self.warm_ids)
        self.warm_ids = torch.cat([self.warm_ids.new_full((free,), _NO_ID), self.warm_ids]).to(self._id_dtype())
        self.assignments = torch.cat([self.assignments.new_zeros(free, self.encoding.width), self.assignments])

    def hold(self, known_NW: Tensor, first_id: int, end: int, num_embeddings: int) -> None:
        """Hold ids ``first_id .. end - 1`` of as many as there are now: what is known of the first, then the start."""
        assert self.warm_ids is None
        self.num_embeddings, self.first_id = num_embeddings, first_id
        new_NW = known_NW.new_zeros(end - first_id - len(known_NW), self.encoding.width)
        self.assignments = torch.cat([known_NW, new_NW])
        if self.assignments.device.type != "meta":
            self._start_from(first_id + len(known_NW))
