"""Fitting tables into memory: which method and size each table gets, so that all of it fits each device."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias, get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import check_tables
from cce_torchrec.methods import METHODS, FullTable
from cce_torchrec.planner.allocate import Allocation, Option, allocate, smallest_budget
from cce_torchrec.planner.candidates import Candidate, all_candidates
from cce_torchrec.planner.expected_loss import PLANNABLE
from cce_torchrec.planner.footprint import Devices, OptimizerName, footprint
from cce_torchrec.planner.plan import BudgetPlan, PlannedTable
from cce_torchrec.planner.traffic import Statistics, Traffic, traffic_of
from cce_torchrec.recluster import ReclusterConfig

Methods: TypeAlias = Sequence[str] | Mapping[str, Mapping[str, Any]]

_LEAST_SHARE = 1e-6


def plan_compression(
    tables: Sequence[EmbeddingBagConfig],
    *,
    budget_bytes: int,
    statistics: Statistics | None = None,
    methods: Methods = ("cce",),
    world_size: int = 1,
    include: str = ".*",
    optimizer: OptimizerName = "rowwise_adagrad",
    recluster: ReclusterConfig | None = None,
    device_type: str = "cuda",
) -> BudgetPlan:
    """Choose a method and a size for every table so that they fit a device's memory and lose least.

        minimise    sum_t traffic_t * loss_t(m_t)        over one candidate m_t for each table t
        such that   sum_t held_t(m_t) + max_t transient_t(m_t) <= budget_bytes

    ``traffic_t`` is the share of all lookups that go to table t (at least a millionth, so that a table without any gets what
    the others leave), ``loss_t`` the share of the energy of its vectors that a
    model of hashing and quantisation expects to be lost (``planner/expected_loss.py``; 0 for a full table), ``held_t`` its
    codebooks, their gradients and optimizer state, assignments, and what a re-clustering holds, ``transient_t`` its turn
    in a re-clustering. Candidates are the full table and each method in eight sizes for every doubling, with each number of
    columns that FBGEMM takes; where ``statistics`` has a number for each id, also with stored assignments for the 256, 1,024,
    4,096, ... most frequent ids only. Among them the choice is optimal, unless ``gap`` of the plan says otherwise.

    Compressed tables are replicated. Full tables are split by rows where there are several devices; while there is
    room left, the smallest are replicated, which is faster.

    Args:
        tables: logical tables; of :class:`CompressedEmbeddingBagConfig`, the ``assignment_placement`` is kept to.
        budget_bytes: for all of this, on each device. Leave out what the dense layers and activations take.
        statistics: lookups by table name, counted over the same examples: one number, or one for each id (a sequence,
            array or tensor; ids that were not seen may be left out). Or the path of a Parquet file or directory with a
            column for each feature, of ids or lists of ids, read once. ``None`` is one lookup a feature, each id as often.
        methods: keys of ``METHODS`` to choose from, or these with fields to keep fixed: ``{"cce": {"num_columns": 4}}``.
        world_size: how many devices.
        include: a regular expression; tables whose whole name does not match stay full.
        optimizer: what trains the tables: "sgd", "rowwise_adagrad", "adagrad" or "adam".
        recluster: the config of re-clusterings, whose workspace is counted; the defaults where ``None``.
        device_type: "cuda" or "cpu"; their workspaces differ.

    Returns:
        The plan, for :func:`compress` and, by its ``constraints()``, for :func:`parameter_constraints`.

    Raises:
        ValueError: a budget that cannot be met (it names the smallest that can), tables twice, a method that cannot be
            planned, fields that do not fit a table, statistics that do not fit the tables, an ``include`` that matches none.

    Example:
        >>> tables = [
        ...     EmbeddingBagConfig(name="t_item", num_embeddings=10_000_000, embedding_dim=32, feature_names=["item"]),
        ...     EmbeddingBagConfig(name="t_day", num_embeddings=7, embedding_dim=32, feature_names=["day"]),
        ... ]
        >>> plan = plan_compression(tables, budget_bytes=600_000_000, statistics={"t_item": 5000, "t_day": 1000})
        >>> {name: method.key for name, method in plan.methods.items()}
        {'t_item': 'cce', 't_day': 'full'}
    """
    _check_arguments(tables, budget_bytes, world_size, optimizer, device_type)
    fixed, included = _checked_methods(methods), _included(tables, include)
    devices = Devices(
        world_size=world_size, optimizer=optimizer, recluster=recluster or ReclusterConfig(), device_type=device_type
    )
    traffic = traffic_of(tables, statistics)
    shares = _shares(traffic)
    candidates = all_candidates(tables, fixed, included, traffic, devices)
    allocation = _allocate(tables, candidates, shares, budget_bytes, world_size)
    chosen = [of_table[number] for of_table, number in zip(candidates, allocation.chosen, strict=True)]
    plan = BudgetPlan(
        tables=tuple(_planned(table, one, shares[table.name]) for table, one in zip(tables, chosen, strict=True)),
        budget_bytes=budget_bytes,
        world_size=world_size,
        gap=allocation.gap,
    )
    return _replicate_small(plan, tables, devices)


def _check_arguments(
    tables: Sequence[EmbeddingBagConfig], budget_bytes: int, world_size: int, optimizer: str, device_type: str
) -> None:
    if not tables:
        raise ValueError(
            "tables is empty: give the EmbeddingBagConfig of each table, such as ebc.embedding_bag_configs()."
        )
    check_tables([_as_full(table) for table in tables])
    for name, value, remedy in (
        ("budget_bytes", budget_bytes, "give the bytes of one device, such as 2 * 10**9"),
        ("world_size", world_size, "give the number of devices"),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer: {remedy}.")
    if optimizer not in get_args(OptimizerName):
        raise ValueError(f"optimizer={optimizer!r} is not one of {get_args(OptimizerName)}.")
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device_type={device_type!r} is neither 'cuda' nor 'cpu'.")


def _as_full(table: EmbeddingBagConfig) -> EmbeddingBagConfig:
    """Its name and sizes: the method that it may have is to be replaced."""
    return EmbeddingBagConfig(
        name=table.name, num_embeddings=table.num_embeddings, embedding_dim=table.embedding_dim, feature_names=[]
    )


def _checked_methods(methods: Methods) -> dict[str, dict[str, Any]]:
    """The fixed fields of each method."""
    if isinstance(methods, str):
        raise ValueError(f"methods={methods!r} is one name: give a list, [{methods!r}].")
    if not methods:
        raise ValueError(f"methods={methods!r} is empty, so nothing could be compressed: give some, such as ['cce'].")
    given = methods if isinstance(methods, Mapping) else {key: {} for key in methods}
    for key, options in given.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"methods[{key!r}]={options!r} fixes no fields: give a dict of them, such as {{'num_columns': 4}}."
            )
    fixed = {key: dict(options) for key, options in given.items()}
    plannable = [method.key for method in PLANNABLE]
    for key, options in fixed.items():
        if key not in plannable:
            raise ValueError(
                f"methods has {key!r}, whose loss has no model to plan by: choose from {plannable} (full is always among "
                "the candidates)."
            )
        known = [field.name for field in fields(METHODS[key])]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"methods[{key!r}] fixes {unknown}, which are not fields of {key!r}; those are {known}.")
    return fixed


def _included(tables: Sequence[EmbeddingBagConfig], include: str) -> set[str]:
    if not isinstance(include, str):
        raise ValueError(f"include={include!r} is no text: give one regular expression, such as 't_(item|user)'.")
    try:
        pattern = re.compile(include)
    except re.error as error:
        raise ValueError(f"include={include!r} is not a regular expression: {error}.") from None
    names = [table.name for table in tables]
    included = {name for name in names if pattern.fullmatch(name)}
    if not included:
        raise ValueError(f"include={include!r} matches no table, so none may be compressed; the tables are {names}.")
    return included


def _shares(traffic: Mapping[str, Traffic]) -> dict[str, float]:
    """Of all lookups, those of each table; of one without any, so few that it gets what the others leave."""
    lookups = sum(of_table.lookups for of_table in traffic.values())
    if lookups <= 0:
        raise ValueError("statistics counts no lookup of any table: count some, or leave statistics out.")
    return {name: max(of_table.lookups / lookups, _LEAST_SHARE) for name, of_table in traffic.items()}


def _allocate(
    tables: Sequence[EmbeddingBagConfig],
    candidates: Sequence[Sequence[Candidate]],
    shares: Mapping[str, float],
    budget_bytes: int,
    world_size: int,
) -> Allocation:
    """One candidate of each table, or a ``ValueError`` that names the smallest budget."""
    options = [
        [Option(c.bytes.held, c.bytes.transient, shares[table.name] * c.loss) for c in of_table]
        for table, of_table in zip(tables, candidates, strict=True)
    ]
    allocation = allocate(options, budget_bytes)
    if allocation is None:
        raise ValueError(
            f"budget_bytes={budget_bytes:,} is too small for the {len(tables)} tables on {world_size} devices: the smallest "
            f"that works is {smallest_budget(options):,}. Raise it, include more tables, fix less of the methods, or "
            "re-cluster with a smaller decode_batch_size."
        )
    return allocation


def _planned(table: EmbeddingBagConfig, chosen: Candidate, share: float) -> PlannedTable:
    return PlannedTable(
        table=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        traffic=share,
        **chosen._asdict(),
    )


def _replicate_small(plan: BudgetPlan, tables: Sequence[EmbeddingBagConfig], devices: Devices) -> BudgetPlan:
    """Spend what is left on whole copies of full tables that were split by rows, the smallest first."""
    planned, room = {t.table: t for t in plan.tables}, plan.budget_bytes - plan.total_bytes
    for table in sorted(tables, key=lambda table: table.num_embeddings * table.embedding_dim):
        if planned[table.name].placement != "row_wise":
            continue
        whole = footprint(table, FullTable(), "replicated", devices)
        more = whole.held - planned[table.name].bytes.held
        if more > room:
            break
        room -= more
        planned[table.name] = replace(planned[table.name], placement="replicated", bytes=whole)
    return replace(plan, tables=tuple(planned.values()))
