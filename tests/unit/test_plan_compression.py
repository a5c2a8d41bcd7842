"""Plans: hand-checked choices, bytes against what models really hold, and what is refused."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import (
    CCE,
    BudgetPlan,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    FullTable,
    ReclusterConfig,
    ResidualCCE,
    compress,
    plan_compression,
    recluster,
)
from cce_torchrec.config import AssignmentPlacement
from cce_torchrec.methods import CE, HashingTrick, MethodConfig
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.methods.encoding import smallest_int_dtype
from cce_torchrec.planner.candidates import all_candidates
from cce_torchrec.planner.expected_loss import expected_loss
from cce_torchrec.planner.footprint import Devices, footprint
from cce_torchrec.planner.traffic import Traffic
from cce_torchrec.recluster.workspace import recluster_workspace
from cce_torchrec.replace import with_method

CPU = torch.device("cpu")
DEVICES = Devices(world_size=1, optimizer="rowwise_adagrad", recluster=ReclusterConfig(), device_type="cpu")


def table(name: str, num_embeddings: int, dim: int = 16, **more: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=[name.removeprefix("t_")], **more
    )


BIG, SMALL = table("t_big", 200_000), table("t_small", 500)


def test_what_fits_stays_full_to_the_byte() -> None:
    needed = (200_000 + 500) * (16 * 4 + 4)  # weights and one row-wise sum a row
    assert set(plan_compression([BIG, SMALL], budget_bytes=needed).methods.values()) == {FullTable()}
    plan = plan_compression([BIG, SMALL], budget_bytes=needed - 1, methods=["ce"])
    assert plan.total_bytes <= needed - 1
    assert {name: method.key for name, method in plan.methods.items()} in (
        {"t_big": "ce", "t_small": "full"},
        {"t_big": "full", "t_small": "ce"},
    )


def test_hashing_checked_by_hand() -> None:
    """One id takes 3/4 of the lookups, another 1/4; they meet in one of two rows half of the time."""
    traffic = Traffic.counted(np.array([3, 1, 0]))
    expected = 0.75 * 0.125 / (0.75 + 0.125) + 0.25 * 0.375 / (0.25 + 0.375)
    assert expected_loss(CE(num_rows=2, num_columns=1), table("t", 3), traffic) == pytest.approx(expected)


def test_clustering_checked_by_hand() -> None:
    """16 of 256 ids' rows: of 8-dim columns k^(-1/4) is left, 1/2 where all is 1/4; then the helper's share."""
    config, even = table("t", 256), Traffic.even(1, 256)
    helper = (255 / 256 / 4) / (1 / 256 + 255 / 256 / 4)
    method = CCE(num_rows=16, num_columns=2, num_helper_rows=4)
    assert expected_loss(method, config, even) == pytest.approx((1 / 2 - 1 / 4) / (1 - 1 / 4) * helper)
    residual = ResidualCCE(num_rows=4, num_levels=3, num_columns=2, num_helper_rows=4)
    assert expected_loss(residual, config, even) == pytest.approx(expected_loss(method, config, even))
    assert expected_loss(CCE(num_rows=256), config, even) == 0


def test_optimal_among_all_sizes() -> None:
    """Every pair of candidates, their bytes and losses computed here."""
    tables, lookups = [table("t_a", 3000, 8), table("t_b", 1000, 8)], {"t_a": 1.0, "t_b": 6.0}
    sizes = sorted({int(2 ** (eighths / 8) + 1e-9) for eighths in range(93)})
    for budget in (40_000, 60_000, 90_000):
        best = np.inf
        per_table = []
        for config in tables:
            traffic, held = Traffic.even(1, config.num_embeddings), []
            held.append((config.num_embeddings * (8 * 4 + 4), 0.0))
            for rows in sizes:
                if rows <= config.num_embeddings:
                    hash_bytes = 8 * 3  # a seed and one number for each of the 2 columns
                    bytes_ = 2 * rows * 8 * 4 + 2 * rows * 4 + hash_bytes  # weights and gradients; sums of both columns
                    loss = expected_loss(CE(num_rows=rows, num_columns=2), config, traffic)
                    if bytes_ < held[0][0]:
                        held.append((bytes_, loss))
            per_table.append(held)
        for (bytes_a, loss_a), (bytes_b, loss_b) in itertools.product(*per_table):
            if bytes_a + bytes_b <= budget:
                best = min(best, (1 * loss_a + 6 * loss_b) / 7)
        plan = plan_compression(tables, budget_bytes=budget, statistics=lookups, methods={"ce": {"num_columns": 2}})
        assert plan.loss == pytest.approx(best)
        assert plan.gap == 0
        assert plan.total_bytes <= budget


def test_sizes_follow_traffic() -> None:
    tables = [table("t_a", 10_000), table("t_b", 10_000)]
    plan = plan_compression(tables, budget_bytes=300_000, statistics={"t_a": 1, "t_b": 9}, methods=["ce"])
    rows = {t.table: t.method.num_params(10_000, 16) for t in plan.tables}
    assert rows["t_b"] > 1.5 * rows["t_a"]


def test_sizes_follow_frequencies() -> None:
    """A table in which few ids take all lookups needs fewer rows."""
    skewed = 1 / np.arange(1, 10_001) ** 1.5
    skewed, even = skewed / skewed.sum(), np.full(10_000, 1e-4)
    plan = plan_compression(
        [table("t_a", 10_000), table("t_b", 10_000)],
        budget_bytes=600_000,
        statistics={"t_a": skewed, "t_b": torch.from_numpy(even)},
        methods=["ce"],
    )
    rows = {t.table: t.method.num_params(10_000, 16) for t in plan.tables}
    assert rows["t_b"] > rows["t_a"]


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "fields", [{}, {"bit_packed": True}, {"bit_packed": True, "num_assigned_ids": 12_345}], ids=str
)
def test_bytes_are_those_of_the_model(name: Any, fields: dict[str, Any]) -> None:
    tables = [table("t_big", 1_000_000), SMALL, table("t_mid", 20_000, 32)]
    plan = plan_compression(tables, budget_bytes=50_000_000, optimizer=name, device_type="cpu", methods={"cce": fields})
    assert {method.key for method in plan.methods.values()} == {"cce", "full"}
    model = compress(nn.Sequential(EmbeddingBagCollection(tables=tables)), plan)
    collection = model[0]
    optimizer = OPTIMIZERS[name](collection.parameters(), lr=0.1)
    ids = KeyedJaggedTensor.from_lengths_sync(
        ["big", "small", "mid"], torch.arange(3), torch.ones(3, dtype=torch.int32)
    )
    collection(ids).values().sum().backward()
    optimizer.step()
    report = {of_table.table: of_table for of_table in collection.memory_report(optimizer).tables}
    for planned in plan.tables:
        real, counted = report[planned.table], planned.bytes
        lowered = next(t for t in collection.lowered_tables if t.name == planned.table)
        steps = 0 if name == "sgd" else 4 * len(lowered.physical_names)
        assert (counted.codebooks, counted.assignments) == (real.codebook_bytes, real.assignment_bytes)
        assert counted.optimizer == real.optimizer_bytes - steps
        gradients = [collection.codebook(name).grad for name in lowered.physical_names]
        if planned.placement == "replicated":
            assert counted.gradients == sum(g.numel() * g.element_size() for g in gradients if g is not None)


@pytest.mark.parametrize("is_trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize(
    ("method", "num_ids", "dim"),
    [
        (CCE(num_rows=64, num_columns=4), 2000, 16),
        (CCE(num_rows=512, num_columns=8), 5_000, 32),
        (CCE(num_rows=256, num_columns=4), 100_000, 16),
        (ResidualCCE(num_rows=128, num_columns=4), 30_000, 32),
        (CCE(num_rows=300, num_columns=4, bit_packed=True), 20_000, 16),
        (CCE(num_rows=128, num_columns=4, num_assigned_ids=20_000), 30_000, 16),
        (CCE(num_rows=64, num_columns=4, num_helper_rows=20_000), 2_000, 16),
    ],
)
def test_the_workspace_is_an_upper_bound(method: MethodConfig, num_ids: int, dim: int, is_trained: bool) -> None:
    config = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=num_ids, embedding_dim=dim, feature_names=["f"], method=method
    )
    collection = CompressedEmbeddingBagCollection(tables=[config])
    optimizer, carried = torch.optim.Adam(collection.parameters()), 0
    if is_trained:
        for parameter in collection.parameters():
            parameter.grad = torch.ones_like(parameter)
            carried += 2 * 4 * parameter.numel()
        optimizer.step()
        optimizer.zero_grad()
    seen = {"t": torch.arange(num_ids, 0, -1.0)} if getattr(method, "num_assigned_ids", None) else None
    tracker = MemTracker()
    tracker.track_external(collection, optimizer)
    with tracker:
        before = tracker.get_tracker_snapshot("current")[CPU]["Total"]
        recluster(collection, seed=0, config=ReclusterConfig(num_iterations=2), optimizer=optimizer, id_weights=seen)
    measured = tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before
    row_map = collection.lowered_tables[0].row_map
    assert isinstance(row_map, CCERowMap)
    bound = recluster_workspace(row_map, ReclusterConfig(), 1, "cpu", optimizer_bytes=carried)
    scores = 4 << 20  # the block of distances, which is not used where the native kernel runs
    assert measured <= sum(bound) <= 2.5 * measured + scores


def test_ids_without_assignments_are_left_to_the_hash() -> None:
    """Half of the lookups are of one id, which alone has stored assignments, and a row of its own."""
    config, traffic = table("t", 3), Traffic.counted(np.array([2.0, 1.0, 1.0]))
    hashed = expected_loss(HashingTrick(num_rows=5), config, traffic)
    for num_ids, warm in ((1, 1 / 2), (2, 3 / 4), (3, 1), (7, 1)):
        method = CCE(num_rows=9, num_columns=1, num_helper_rows=5, num_assigned_ids=num_ids)
        assert expected_loss(method, config, traffic) == pytest.approx((1 - warm) * hashed)


def test_frequent_ids_alone_get_assignments_where_bytes_are_few() -> None:
    """A few ids have nearly all lookups: assignments for them lose less than a byte for each of all ids."""
    lookups = np.random.default_rng(0).zipf(1.5, 200_000).clip(max=200_000)
    settings: dict[str, Any] = {
        "statistics": {"t_big": np.bincount(lookups - 1, minlength=200_000)},
        "device_type": "cpu",
        "recluster": ReclusterConfig(decode_batch_size=1024),
    }
    best, of_all = (
        plan_compression([BIG], budget_bytes=3_000_000, methods={"cce": options}, **settings)
        for options in ({}, {"num_assigned_ids": None})
    )
    assert best.loss < of_all.loss
    methods = [plan.methods["t_big"] for plan in (best, of_all)]
    assert [isinstance(method, CCE) and method.num_assigned_ids is None for method in methods] == [False, True]
    with pytest.raises(ValueError, match="too small for the 1 tables"):
        plan_compression([BIG], budget_bytes=1_000_000, methods={"cce": {"num_assigned_ids": None}}, **settings)
    plan = plan_compression([BIG], budget_bytes=1_000_000, **settings)
    model = compress(nn.Sequential(EmbeddingBagCollection(tables=[BIG], device=CPU)), plan)
    (report,) = model[0].memory_report().tables
    assert report.assignment_bytes == plan.tables[0].bytes.assignments
    even = {**settings, "statistics": {"t_big": np.ones(200_000)}}
    (method,) = plan_compression([BIG], budget_bytes=6_000_000, **even).methods.values()
    assert isinstance(method, CCE)
    assert method.num_assigned_ids is None


@pytest.mark.parametrize(
    ("counts", "fixed", "placement", "expected"),
    [
        (np.arange(5000), {}, "replicated", {None, 256, 1024, 4096}),
        (np.arange(5000) * (np.arange(5000) >= 4900), {}, "replicated", {None, 256}),  # 100 ids were seen
        (np.ones(5000), {}, "replicated", {None}),
        (np.arange(5000), {}, "sharded", {None}),
        (np.arange(5000), {"num_assigned_ids": None}, "replicated", {None}),
        (np.arange(5000), {"num_assigned_ids": 77}, "replicated", {77}),
    ],
)
def test_how_many_ids_may_get_assignments(
    counts: np.ndarray, fixed: dict[str, Any], placement: AssignmentPlacement, expected: set[int | None]
) -> None:
    config = CompressedEmbeddingBagConfig(**vars(table("t", 5000)), assignment_placement=placement)
    (candidates,) = all_candidates([config], {"cce": fixed}, {"t"}, {"t": Traffic.counted(counts)}, DEVICES)
    methods = [candidate.method for candidate in candidates]
    assert {method.num_assigned_ids for method in methods if isinstance(method, CCE)} == expected


@pytest.mark.parametrize("first", [0, 1, 3, 8])
def test_traffic_of_the_most_looked_up_ids(first: int) -> None:
    """Against each id on its own."""
    counts = [5.0, 0, 2, 2, 9, 1, 1, 1]
    traffic, shares = Traffic.counted(np.array(counts)), sorted((n / 21 for n in counts), reverse=True)
    assert traffic.share_of_first(first) == pytest.approx(sum(shares[:first]))
    left = shares[first:]
    others = traffic.without_first(first)
    assert others.total == pytest.approx(sum(left))
    pairs = [(p, (sum(left) - p) / 3) for p in left if p > 0]
    assert others.lost_to_hash(3) == pytest.approx(sum(p * q / (p + q) for p, q in pairs if p + q > 0))


def test_hot_ids_lose_nothing() -> None:
    """Lookups 4, 2, 1, 1: without the first id, the shares that are left meet with each other only."""
    config, traffic = table("t", 4), Traffic.counted(np.array([4.0, 2.0, 1.0, 1.0]))
    method = CCE(num_rows=2, num_columns=2, num_helper_rows=5, num_hot_ids=1)
    quarter, eighth = 1 / 4, 1 / 8
    others = [(quarter, (2 * eighth) / 5), (eighth, (quarter + eighth) / 5), (eighth, (quarter + eighth) / 5)]
    hashed = sum(share * other / (share + other) for share, other in others)
    learned = (2 ** (-2 / 8) - 3 ** (-2 / 8)) / (1 - 3 ** (-2 / 8))
    assert expected_loss(method, config, traffic) == pytest.approx(learned * hashed)
    limited = CCE(**{**vars(method), "num_assigned_ids": 3})  # two ids share learned rows, one is left to the hash
    assert expected_loss(limited, config, traffic) == pytest.approx(hashed * eighth / (quarter + 2 * eighth))
    assert expected_loss(CCE(**{**vars(method), "num_hot_ids": 4}), config, traffic) == 0


def test_tables_without_lookups_get_what_the_others_leave() -> None:
    tables = [table("t_item", 20_000), table("t_user", 30_000), table("t_day", 7)]
    seen = {"t_item": 0, "t_user": 5.0, "t_day": 0}
    room = plan_compression(tables, budget_bytes=6_000_000, statistics=seen)
    assert {name for name, method in room.methods.items() if method == FullTable()} >= {"t_user", "t_day"}
    everything = plan_compression(tables, budget_bytes=60_000_000, statistics=seen)
    assert set(everything.methods.values()) == {FullTable()}


def test_several_devices() -> None:
    one = footprint(BIG, FullTable(), "row_wise", DEVICES)
    four = Devices(**{**vars(DEVICES), "world_size": 4})
    assert 4 * footprint(BIG, FullTable(), "row_wise", four).held == one.held == 200_000 * 68
    sharded = CompressedEmbeddingBagConfig(**vars(BIG), assignment_placement="sharded")
    method = CCE(num_rows=256, num_columns=4)
    in_block, whole = footprint(sharded, method, "replicated", four), footprint(BIG, method, "replicated", four)
    assert whole.assignments - in_block.assignments == 4 * 150_000
    assert whole.workspace - in_block.workspace == 4 * 150_000
    packed = CCE(num_rows=33, num_columns=4, bit_packed=True)  # 4 x 6 bits
    in_block, whole = footprint(sharded, packed, "replicated", four), footprint(BIG, packed, "replicated", four)
    assert whole.assignments - in_block.assignments == whole.workspace - in_block.workspace == 3 * 150_000


def test_ten_billion_ids() -> None:
    """Nothing is allocated, and what is by id is shared out: no device holds V * c bytes."""
    huge = [
        CompressedEmbeddingBagConfig(**vars(table(f"t_{i}", 10**10, 64)), assignment_placement="sharded")
        for i in range(10)
    ]
    totals = {}
    for world_size in (128, 1024):
        plan = plan_compression(huge, budget_bytes=16 << 30, world_size=world_size)
        assert {method.key for method in plan.methods.values()} == {"cce"}
        for planned in plan.tables:
            method = planned.method
            assert isinstance(method, CCE)
            per_id = method.num_columns * smallest_int_dtype(method.num_rows).itemsize
            block = 10**10 // world_size * per_id
            assert block <= planned.bytes.assignments < block + 2 * per_id + 8 * (method.num_columns + 2)
        totals[world_size] = plan.loss
    assert totals[1024] < totals[128]
    with pytest.raises(ValueError, match="the smallest that works is"):
        plan_compression(huge, budget_bytes=16 << 30, world_size=8)


def test_what_is_left_replicates_the_smallest_full_tables() -> None:
    tables = [BIG, SMALL, table("t_tiny", 3)]
    per_row = (16 * 4 + 4) / 2
    plan = plan_compression(tables, budget_bytes=int(200_500 * per_row) + 500 * 200, world_size=2)
    assert {t.table: t.placement for t in plan.tables} == {
        "t_big": "row_wise",
        "t_small": "replicated",
        "t_tiny": "replicated",
    }
    assert plan.constraints()["t_big"].sharding_types == ["row_wise"]
    assert plan.total_bytes <= plan.budget_bytes


def test_saved_and_loaded(tmp_path: Path) -> None:
    plan = plan_compression(
        [BIG, SMALL], budget_bytes=5_000_000, methods={"cce": {"seed": 7}, "ce": {}}, device_type="cpu"
    )
    plan.save(tmp_path / "plan.json")
    assert BudgetPlan.load(tmp_path / "plan.json") == plan
    assert str(plan).count("\n") == 3
    assert "t_big" in str(plan)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="not a plan of format 1"):
        BudgetPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([table("t_big", 300_000), SMALL], "'t_big': it has .*300000.*was planned with .*200000.*plan again"),
        ([BIG, table("t_small", 500, 32)], "'t_small': it has .*32.*was planned with .*16"),
    ],
)
def test_a_plan_is_for_tables_of_its_sizes(tables: list[EmbeddingBagConfig], says: str) -> None:
    """Otherwise the bytes would not be those that were planned; tables that it does not know stay full."""
    plan = plan_compression([BIG, SMALL], budget_bytes=5_000_000, methods=["ce"])
    with pytest.raises(ValueError, match=says):
        compress(nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device("meta"))), plan)
    more = EmbeddingBagCollection(tables=[BIG, SMALL, table("t_new", 7)], device=torch.device("meta"))
    methods = [each.method for each in compress(nn.Sequential(more), plan)[0].embedding_bag_configs()]
    assert methods == [*plan.methods.values(), FullTable()]


def test_the_smallest_budget_works() -> None:
    with pytest.raises(ValueError, match="too small for the 2 tables") as error:
        plan_compression([BIG, SMALL], budget_bytes=1000)
    smallest = int(re.search(r"smallest that works is ([\d,]+)", str(error.value))[1].replace(",", ""))  # type: ignore[index]
    assert plan_compression([BIG, SMALL], budget_bytes=smallest).total_bytes == smallest
    with pytest.raises(ValueError, match=f"{smallest:,}"):
        plan_compression([BIG, SMALL], budget_bytes=smallest - 1)


def test_sharded_assignments_do_not_follow_a_table_that_stays_full() -> None:
    """A budget in which it fits whole: nothing is left to place, and the plan can be carried out."""
    table_ = CompressedEmbeddingBagConfig(
        **vars(SMALL), method=CCE(num_rows=4, num_columns=2), assignment_placement="sharded"
    )
    plan = plan_compression([table_], budget_bytes=10**9)
    assert with_method(table_, plan.methods["t_small"]).method == FullTable()


def test_only_included_tables_are_compressed() -> None:
    tables = [BIG, table("t_other", 200_000)]
    plan = plan_compression(tables, budget_bytes=20_000_000, include=".*_big", methods=["ce"])
    assert {name: method.key for name, method in plan.methods.items()} == {"t_big": "ce", "t_other": "full"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ["nothing"]}, "choose from"),
        ({"methods": ["dhe"]}, "no model to plan by"),
        ({"methods": "cce"}, "give a list"),
        ({"methods": {"cce": {"rows": 3}}}, "not fields"),
        ({"methods": []}, "methods=.. is empty"),
        ({"methods": {"cce": 4}}, r"methods\['cce'\]=4 fixes no fields"),
        ({"methods": {"cce": {"num_rows": 10**6}}}, "t_big.*the smallest possible is"),
        ({"include": ["t_big"]}, r"include=\['t_big'\] is no text"),
        ({"methods": {"cce": {"num_columns": 5}}}, "t_big.*nearest numbers of columns"),
        ({"include": "u_.*"}, "matches no table"),
        ({"include": "("}, "not a regular expression"),
        ({"optimizer": "lamb"}, "not one of"),
        ({"device_type": "tpu"}, "neither"),
        ({"world_size": 0}, "world_size=0 is not a positive integer: give the number of devices"),
        ({"budget_bytes": 1.5}, "budget_bytes=1.5 is not a positive integer"),
        ({"budget_bytes": 0}, "budget_bytes=0 is not .*: give the bytes of one device"),
        ({"budget_bytes": -1}, "budget_bytes=-1 is not"),
        ({"budget_bytes": "2GB"}, "budget_bytes='2GB' is not"),
        ({"tables": []}, "tables is empty"),
        ({"tables": [BIG, BIG]}, "Duplicate table name 't_big'"),
        ({"statistics": {"t_big": 1}}, "statistics lacks .'t_small'.; the tables"),
        ({"statistics": {"t_big": 1, "t_small": 1, "x": 1}}, "names no tables, .'x'.; the tables"),
        ({"statistics": {"t_big": 0, "t_small": 0}}, "no lookup"),
        ({"statistics": {"t_big": -1, "t_small": 0}}, "below 0"),
        ({"statistics": {"t_big": 1, "t_small": [1] * 501}}, "500 ids"),
        ({"statistics": {"t_big": 1, "t_small": "many"}}, "t_small'. is str, of which no numbers"),
        ({"statistics": {"t_big": {7: 1}, "t_small": 1}}, "t_big'. is dict, of which no numbers"),
        ({"statistics": {"t_big": float("nan"), "t_small": 1}}, "not finite"),
        ({"statistics": {"t_big": [[1]], "t_small": 1}}, r"shape \(1, 1\)"),
        ({"statistics": 3}, "neither lookups"),
        ({"statistics": "/nowhere"}, "does not exist"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_compression(**{"tables": [BIG, SMALL], "budget_bytes": 5_000_000, **settings})
