"""The contract of a method: a frozen config (sizes, budgets; what users write), and one of two ways to a vector.

* A row method has a :class:`RowMap`, the id -> rows function with its state, buffers only. In every column an id becomes a
  few rows of a small table, whose sum is its vector:

      vector(id) = scale * concat_{i < C} ( sum_{j < R} w_i(id)_j W_i[ rows_i(id)_j ] ),      w = 1 but for signed hashes

  The rows live in an ordinary TorchRec ``EmbeddingBagCollection``, which is what makes every sharding type, kernel and
  optimizer work.
* A decode method has a :class:`Decoder`, which computes a vector per id from dense parameters of its own (a product, a
  network, learned weights); vectors are then pooled. TorchRec replicates these parameters, as any dense module's.

See docs/add_a_method.md. Shapes: N ids, C columns, R rows an id and column, D dims.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from cce_torchrec.hashing import MAX_ROWS

CHECKPOINT_FORMAT = 1  # to be raised when what a row map stores, or its hash functions, change


class Column(NamedTuple):
    """The physical table of one column: ``num_rows`` vectors of ``dim`` numbers."""

    num_rows: int
    dim: int


class RowSource(NamedTuple):
    """Where native kernels find the rows of an id: A stored ones a column, then H hashed ones; with neither, its own number.

        rows_i(id) = [ a * level_rows + assignments[id - first_id, i A + a]  for a < A ]
                   + [ hashed_from + hash_{i H + h}(id)                      for h < H ]

    An id whose assignment is hot in a column, ``hot_from`` or above, has that row in place of the hashed ones, too.

    Attributes:
        num_ids: how many ids, from ``first_id`` on, can be looked up; -1 for any id.
        first_id: the id of the first assignment.
        assignments: uint8, int16 or int32 [num_ids, C * A], contiguous.
        num_stored: A.
        level_rows: from one stored row to the next.
        coefficients: int64 [1 + C * H], of the hash functions.
        num_hashes: H.
        num_hashed_rows: the range of the hashes.
        hashed_from: what is added to them.
        hot_from: the first hot assignment, where there are hot ones; only for A = 1.
    """

    num_ids: int = -1
    first_id: int = 0
    assignments: Tensor | None = None
    num_stored: int = 0
    level_rows: int = 0
    coefficients: Tensor | None = None
    num_hashes: int = 0
    num_hashed_rows: int = 0
    hashed_from: int = 0
    hot_from: int | None = None


class IdMap(nn.Module, ABC):
    """What turns the ids of one logical table into rows or vectors.

    Attributes:
        bounded: whether an id must lie in [0, num_embeddings) because something is stored or sized by id.
    """

    bounded: bool = False

    @property
    def can_grow(self) -> bool:
        """Whether ids can be added: no parameter is sized by id."""
        return not self.bounded

    def grow(self, num_embeddings: int) -> None:
        """Take in the ids up to ``num_embeddings - 1``, hashed; those before stay what they are. Only where it can grow."""
        assert self.can_grow


class RowMap(IdMap):
    """Ids to physical rows, for one logical table; its state is in buffers.

    Attributes:
        columns: the physical table of each column; their dims add up to the logical dim, or to what a :class:`Projection`
            of the method takes.
        rows_per_id: R, how many rows of a column are summed for one id.
        scale: what the sum is multiplied by.
        has_row_weights: whether rows are multiplied by :meth:`row_weights`. All tables of the collection are then looked up
            with weights, so this is for what cannot be said by rows alone.
    """

    columns: tuple[Column, ...]
    rows_per_id: int = 1
    scale: float = 1.0
    has_row_weights: bool = False

    @abstractmethod
    def rows(self, ids_N: Tensor) -> Tensor:
        """Physical rows of each id.

        Args:
            ids_N: int64 [N]; inside [0, num_embeddings) where the map is ``bounded``.

        Returns:
            int64 [C, N, R], contiguous.
        """

    def write_rows(self, ids_N: Tensor, values_M: Tensor, starts_C: Sequence[int | None]) -> bool:
        """Write what :meth:`rows` returns straight to where it is looked up, where a native kernel can; optional.

        Args:
            ids_N: any ids, not checked yet.
            values_M: int64 [M], the rows of many tables.
            starts_C: where in it the N * R rows of each column begin; ``None`` leaves the column out.

        Returns:
            Whether it was done. It must decline where :meth:`rows` could fail, an id out of bounds for one.
        """
        return False

    def source(self) -> RowSource | None:
        """Where native kernels find what :meth:`rows` returns; ``None`` where they cannot, or rows have weights."""
        return None

    def row_weights(self, ids_N: Tensor) -> Tensor:
        """What each of the :meth:`rows` is multiplied by; only where ``has_row_weights``.

        Args:
            ids_N: as for :meth:`rows`.

        Returns:
            float32, broadcastable to [C, N, R]; a constant, through which no gradient flows.
        """
        raise NotImplementedError

    def stored_bytes(self) -> int:
        """Bytes of everything stored beside the parameters."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def reset_parameters(self) -> None:
        """Compute the buffers anew, as after construction; for maps built on the meta device."""


class DensePart(nn.Module, ABC):
    """What a table has beside rows: dense parameters, which TorchRec replicates; all else that it stores is in buffers."""

    def stored_bytes(self) -> int:
        """Bytes of everything stored beside the parameters."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters (from torch's global generator) and compute the buffers anew; for parts built on "meta"."""


class Projection(DensePart):
    """A linear map, without a bias, from the columns of a row method to its vectors; it is applied to pooled sums.

    Rows have the full table's initial size, so a projection keeps it by elements of variance 1 / d.
    """

    @abstractmethod
    def forward(self, pooled_Bd: Tensor) -> Tensor:
        """Vectors of sums of rows.

        Args:
            pooled_Bd: float32 [B, d], d the sum of the dims of the columns.

        Returns:
            float32 [B, D], whatever the type of the parameters.
        """


class Decoder(IdMap, DensePart):
    """Ids to vectors, for one logical table; parameters are dense, everything else it stores is in buffers."""

    @abstractmethod
    def forward(self, ids_N: Tensor) -> Tensor:
        """The vector of each id.

        Args:
            ids_N: int64 [N], N may be 0; inside [0, num_embeddings) where the decoder is ``bounded``.

        Returns:
            float32 [N, D], whatever the type of the parameters; memory grows with N, not with V.
        """


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """How one table is compressed; subclasses add their sizes.

    Attributes:
        key: its name in the registry.
        stores_assignments: whether rows are stored for each id, so that they can be learned.
        reclusterable: whether re-clustering learns them from the table itself.
    """

    key: ClassVar[str]
    stores_assignments: ClassVar[bool] = False
    reclusterable: ClassVar[bool] = False

    @property
    def counts_ids(self) -> bool:
        """Whether a collection counts how often the ids of its table occur in training, for the re-clusterings."""
        return False

    @abstractmethod
    def num_params(self, num_embeddings: int, embedding_dim: int) -> int:
        """Trainable parameters of a table of ``num_embeddings`` ids and ``embedding_dim`` dims."""

    @classmethod
    @abstractmethod
    def largest_fields(
        cls, num_embeddings: int, embedding_dim: int, num_params: int, overrides: dict[str, Any]
    ) -> dict[str, Any]:
        """The fields of the largest instance within a budget, given the ``overrides``; see :meth:`from_budget`."""

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, num_params: int, **overrides: Any) -> Self:
        """The largest instance with at most ``num_params`` trainable parameters.

        Args:
            num_embeddings: V, ids of the table.
            embedding_dim: D, dims of its vectors.
            num_params: the budget, in parameters (not bytes).
            **overrides: fields of the config to fix instead of choosing them.

        Raises:
            ValueError: where no instance fits; it names the smallest budget that works.
        """
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if not isinstance(num_params, int):
            raise ValueError(f"num_params={num_params!r} is not an integer.")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise ValueError(f"{cls.__name__} has no fields {unknown}; it has {known}.")
        overrides = {name: value for name, value in overrides.items() if value is not None}
        integers = [field.name for field in fields(cls) if field.type in (int, int | None) and field.name != "seed"]
        optional = [field.name for field in fields(cls) if field.default == 0]
        for name in integers:
            if name in overrides and name in optional:
                check_not_negative(**{name: overrides[name]})
            # What a size of another name may be, the method itself says better.
            elif name in overrides and (name.startswith("num_") or not isinstance(overrides[name], int)):
                check_positive(**{name: overrides[name]})
        method = cls(**{**cls.largest_fields(num_embeddings, embedding_dim, num_params, overrides), **overrides})
        needed = method.num_params(num_embeddings, embedding_dim)
        if needed > num_params:
            raise ValueError(
                f"{method} needs {needed} parameters, more than the budget of {num_params}: raise it to that."
            )
        return method

    def layout(self, num_embeddings: int, embedding_dim: int) -> str:
        """What a checkpoint of such a table must have been saved from; seeds may differ, hashes are saved."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes().items())
        return f"{self.key}({sizes}) {num_embeddings}x{embedding_dim} format {CHECKPOINT_FORMAT}"

    def sizes(self) -> dict[str, Any]:
        """The fields that say what is stored, defaults filled in."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}


class RowMethod(MethodConfig):
    """A method whose vectors are sums of rows."""

    @abstractmethod
    def row_map(self, table: str, num_embeddings: int, embedding_dim: int, device: torch.device | None) -> RowMap:
        """Build the id -> rows function of the table named ``table``, which seeds its hashes."""

    def projection(self, table: "TableSpec") -> "Projection | None":
        """What makes vectors of the columns side by side, where these are not the vectors themselves."""
        return None


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The table that a decoder, or rows and a projection, stand for.

    Attributes:
        name: seeds its hashes.
        num_embeddings: V, its ids.
        embedding_dim: D, dims of its vectors.
        std: the root mean square that the elements of vectors shall have at the start, that of the full table's.
        dtype: of the parameters.
        device: of parameters and buffers; "meta" builds neither.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    std: float
    dtype: torch.dtype
    device: torch.device | None


class DecodeMethod(MethodConfig):
    """A method whose vectors are computed, id by id, from dense parameters."""

    @abstractmethod
    def decoder(self, table: TableSpec) -> Decoder:
        """Build the id -> vector function of a table."""


def check_positive(**values: int) -> None:
    """Raise a ``ValueError`` for every value that is not an integer above 0."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer.")


def check_not_negative(**values: int) -> None:
    """Raise a ``ValueError`` for every value that is not an integer of 0 or more."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r} is not an integer of 0 or more.")


def check_bool(**values: bool) -> None:
    """Raise a ``ValueError`` for every value that is no ``bool``."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is neither True nor False.")


def check_rows(**values: int) -> None:
    """Raise a ``ValueError`` for every number of rows that no hash can map to."""
    check_positive(**values)
    for name, value in values.items():
        if value > MAX_ROWS:
            raise ValueError(f"{name}={value} is above {MAX_ROWS}, the most rows a hash can map to.")


def check_divides(embedding_dim: int, num_columns: int) -> None:
    """Raise a ``ValueError`` with the divisors near ``num_columns`` where the columns do not cut the dim evenly."""
    if embedding_dim % num_columns:
        divisors = [d for d in range(1, embedding_dim + 1) if embedding_dim % d == 0]
        below, above = [d for d in divisors if d < num_columns][-1:], [d for d in divisors if d > num_columns][:1]
        raise ValueError(
            f"embedding_dim={embedding_dim} cannot be cut in num_columns={num_columns} equal columns; "
            f"the nearest numbers of columns that work are {' and '.join(map(str, below + above))}."
        )


def default_num_columns(embedding_dim: int, at_most: int) -> int:
    """The most columns up to ``at_most`` whose width FBGEMM takes (a multiple of 4), or 1."""
    widths = range(4, embedding_dim + 1, 4)
    return max(
        (embedding_dim // w for w in widths if embedding_dim % w == 0 and embedding_dim // w <= at_most), default=1
    )


def budget_rows(method: str, num_params: int, embedding_dim: int, smallest: int) -> int:
    """How many full-width rows fit in ``num_params``; a ``ValueError`` naming the smallest budget if under ``smallest``."""
    rows = num_params // embedding_dim
    if rows < smallest:
        raise ValueError(
            f"{method}: a budget of {num_params} parameters is too small at embedding_dim={embedding_dim}; "
            f"the smallest possible is {smallest * embedding_dim}."
        )
    return rows


def id_chunks(num_embeddings: int, device: torch.device | None = None, size: int = 1 << 18) -> Iterator[Tensor]:
    """All ids of a table in order, a bounded number at a time."""
    for start in range(0, num_embeddings, size):
        yield torch.arange(start, min(start + size, num_embeddings), device=device)
