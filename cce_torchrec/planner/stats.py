"""TorchRec's report of a sharding plan, with a table by what users call their tables."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import ShardingOption

from cce_torchrec.collection import CompressedEmbeddingBagCollection
from cce_torchrec.config import method_of
from cce_torchrec.lowering import DecodedTable, LoweredTable

logger = logging.getLogger(__name__)

_HEADER = ["table", "method", "columns", "rows x dims", "sharding type", "kernel", "ranks", "bytes", "perf ms"]


class CompressedEmbeddingStats(EmbeddingStats):
    """TorchRec's planner statistics, and then the plan by *logical* table: a line for all columns that are placed alike.

    Bytes and milliseconds are the planner's estimates, summed over the columns and shards of a line; give the planner our
    estimators for exact bytes. Pass it to the planner, which logs it at INFO as it logs its own statistics.

    Example:
        >>> from torchrec.distributed.planner import EmbeddingShardingPlanner
        >>> from torchrec.distributed.planner.types import Topology
        >>> stats = CompressedEmbeddingStats()
        >>> planner = EmbeddingShardingPlanner(topology=Topology(world_size=2, compute_device="cpu"), stats=stats)

    After ``planner.plan(...)``, ``stats.table`` is the table alone; empty on ranks that did not plan.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = ""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Called by the planner."""
        super().log(*args, **kwargs)
        self.table = plan_table(kwargs["best_plan"])
        logger.info("sharding plan of %d ranks:\n%s", kwargs["topology"].world_size, self.table)


class _Place(NamedTuple):
    """Where columns are; those of one table with the same place share a line."""

    size: str
    sharding_type: str
    kernel: str
    ranks: str


def plan_table(options: Sequence[ShardingOption]) -> str:
    """A plan by logical table, as text; tables of other collections are named as they are, decode tables come last."""
    if not options:
        return "Nothing is sharded: all tables are replicated with the dense layers."
    lines: list[list[str]] = []
    done: set[int] = set()
    by_name = {(id(option.module[1]), option.name): option for option in options}
    for option in options:
        collection = option.module[1]
        if not isinstance(collection, CompressedEmbeddingBagCollection):
            rows, dim = option.tensor.shape
            lines.append([option.name, "", "", *_place(option, f"{rows} x {dim}"), *_cost([option])])
        elif id(collection) not in done:
            done.add(id(collection))
            for table in collection.lowered_tables:
                found = [by_name.get((id(collection), name)) for name in table.physical_names]
                lines += _lines(table, [each for each in found if each is not None])
            lines += [_dense(table) for table in collection.decoded_tables]
    return _aligned([_HEADER, *lines])


def _lines(table: LoweredTable, options: Sequence[ShardingOption]) -> Iterator[list[str]]:
    """Of one table: one where all of its columns are placed alike."""
    places: dict[_Place, list[ShardingOption]] = {}
    for option in options:
        rows, dim = option.tensor.shape
        places.setdefault(_place(option, f"{rows} x {dim}"), []).append(option)
    for place, alike in places.items():
        columns = [table.physical_names.index(option.name) for option in alike]
        yield [table.name, method_of(table.config).key, _ranges(columns), *place, *_cost(alike)]


def _dense(table: DecodedTable) -> list[str]:
    """Of a decode table, which DDP replicates: the bytes of a replica."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in table.decoder.parameters())
    return [table.name, method_of(table.config).key, "", "", "replicated", "dense", "all", f"{size:,}", ""]


def _place(option: ShardingOption, size: str) -> _Place:
    ranks = sorted({shard.rank for shard in option.shards if shard.rank is not None})
    return _Place(size, option.sharding_type, option.compute_kernel, _ranges(ranks))


def _cost(options: Sequence[ShardingOption]) -> list[str]:
    """Bytes and milliseconds of all shards."""
    shards = [shard for option in options for shard in option.shards]
    storages = [shard.storage for shard in shards if shard.storage is not None]
    perfs = [shard.perf.total for shard in shards if shard.perf is not None]
    return [f"{sum(each.hbm + each.ddr + each.ssd for each in storages):,}", f"{sum(perfs):.3f}"]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 6` of 0, 1, 2, 3, 6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(texts)
