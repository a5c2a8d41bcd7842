"""What a table may become: the full table, and each method in eight sizes a doubling with every number of columns.

Where it is known which ids are looked up most, also with stored assignments for these alone: 256, 1,024, 4,096, ... of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import has_sharded_assignments
from cce_torchrec.methods import METHODS, FullTable, MethodConfig, RowMethod
from cce_torchrec.planner.expected_loss import expected_loss
from cce_torchrec.planner.footprint import Devices, Footprint, Placement, footprint
from cce_torchrec.planner.traffic import Traffic

_SIZES_A_DOUBLING = 8
_MOST_COLUMNS = 16
_FEWEST_ASSIGNED_IDS = 256


class Candidate(NamedTuple):
    """One way to store a table."""

    method: MethodConfig
    placement: Placement
    bytes: Footprint
    loss: float


def all_candidates(
    tables: Sequence[EmbeddingBagConfig],
    fixed: Mapping[str, Mapping[str, Any]],
    included: set[str],
    traffic: Mapping[str, Traffic],
    devices: Devices,
) -> list[list[Candidate]]:
    """Those of each table; tables that are alike share theirs, for there may be a thousand of them."""
    of_kind: dict[Any, list[Candidate]] = {}
    candidates = []
    for table in tables:
        of_table = traffic[table.name]
        sizes = (table.num_embeddings, table.embedding_dim, table.data_type, has_sharded_assignments(table))
        kind = (*sizes, table.name in included, of_table.shares_U.tobytes(), of_table.numbers_U.tobytes())
        if kind not in of_kind:
            of_kind[kind] = list(_candidates(table, fixed if table.name in included else {}, of_table, devices))
        candidates.append(of_kind[kind])
    return candidates


def _candidates(
    table: EmbeddingBagConfig, fixed: Mapping[str, Mapping[str, Any]], traffic: Traffic, devices: Devices
) -> Iterator[Candidate]:
    """The full table, and every method in sizes that are smaller."""
    full, placement = FullTable(), full_placement(table, devices)
    in_full = footprint(table, full, placement, devices)
    yield Candidate(full, placement, in_full, 0.0)
    seen: set[MethodConfig] = set()
    for key, options in fixed.items():
        for method in _sizes(key, table, options, traffic):
            if method not in seen:
                seen.add(method)
                needs = footprint(table, method, "replicated", devices)
                if needs.held < in_full.held:
                    yield Candidate(method, "replicated", needs, expected_loss(method, table, traffic))


def full_placement(table: EmbeddingBagConfig, devices: Devices) -> Placement:
    """By rows, where each device gets some."""
    if devices.world_size == 1:
        return "table_wise"
    block = -(-table.num_embeddings // devices.world_size)
    return "row_wise" if block * (devices.world_size - 1) < table.num_embeddings else "replicated"


def _sizes(key: str, table: EmbeddingBagConfig, options: Mapping[str, Any], traffic: Traffic) -> Iterator[RowMethod]:
    """Instances of a method of all sizes that are smaller than the full table's."""
    method, num_ids, dim = METHODS[key], table.num_embeddings, table.embedding_dim
    probe = max(1024, min(num_ids - 1, 1 << 20)) * dim  # parameters in which any choice of fields should fit
    try:
        method.from_budget(num_ids, dim, probe, **options)
    except ValueError as error:
        raise ValueError(f"Table {table.name!r}, methods[{key!r}]={dict(options)}: {error}") from None
    columns: Sequence[int | None] = [options.get("num_columns")]  # None is what the method chooses itself
    if method.stores_assignments and columns == [None]:
        widths = [width for width in range(4, dim + 1, 4) if dim % width == 0 and dim // width <= _MOST_COLUMNS]
        columns = [dim // width for width in widths] or [1]
    wishes = [dict(options)] if columns == [None] else [{**options, "num_columns": number} for number in columns]
    if "num_assigned_ids" not in options and "num_assigned_ids" in {field.name for field in fields(method)}:
        wishes += [{**wish, "num_assigned_ids": number} for number in _assigned_ids(table, traffic) for wish in wishes]
    exponent = 0
    while (rows := int(2 ** (exponent / _SIZES_A_DOUBLING) + 1e-9)) <= num_ids:
        exponent += 1
        for wish in wishes:
            try:
                found = method.from_budget(num_ids, dim, rows * dim, **wish)
            except ValueError:
                continue  # too few rows for what is fixed
            assert isinstance(found, RowMethod)
            yield found


def _assigned_ids(table: EmbeddingBagConfig, traffic: Traffic) -> list[int]:
    """How many ids may have stored assignments, if not all: those that are looked up most."""
    if len(traffic.shares_U) < 2 or has_sharded_assignments(table):
        return []
    numbers, number = [], _FEWEST_ASSIGNED_IDS
    while number < min(table.num_embeddings, 4 * int(traffic.numbers_U.sum())):  # more than were seen gain nothing
        numbers.append(number)
        number *= 4
    return numbers
