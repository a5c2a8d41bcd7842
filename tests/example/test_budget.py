"""Budgets: never exceeded, nearly used up, and the largest compression that an error names is the largest."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cce_torchrec import METHODS
from dlrm_example.budget import full_params, num_params, plan_tables
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.data import DatasetInfo, SparseFeature

ROWS = {"user": 943, "item": 1682, "gender": 2, "age": 7, "zip": 795, "year": 72}
INFO = DatasetInfo(
    name="like_movielens",
    sparse_features=tuple(SparseFeature(name=name, num_embeddings=rows) for name, rows in ROWS.items()),
    dense_names=("age",),
)
COMPRESSING = [method for method in METHODS if method != "full"]


def config(method: str, compression: float = 1.0, **changes: object) -> TrainConfig:
    return TrainConfig(run_dir="x", method=method, compression=compression, **changes)  # type: ignore[arg-type]


def test_full_tables() -> None:
    tables = plan_tables(INFO, config("full", 1.0))
    assert num_params(tables) == full_params(INFO, 32) == sum(ROWS.values()) * 32
    assert [table.feature_names for table in tables] == [[name] for name in ROWS]


@pytest.mark.parametrize("method", COMPRESSING)
@pytest.mark.parametrize("compression", [2.0, 8.0, 10.0])
def test_budget_is_kept_and_used(method: str, compression: float) -> None:
    tables = plan_tables(INFO, config(method, compression))
    budget = sum(ROWS.values()) * 32 / compression
    assert 0.75 * budget < num_params(tables) <= budget  # rows of low_dim grow by four dims at a time
    for table, rows in zip(tables, ROWS.values(), strict=True):
        assert table.method.key == (method if rows >= 100 else "full")


def test_shares_follow_the_rows() -> None:
    tables = {table.name: table for table in plan_tables(INFO, config("hashing_trick", 8.0))}
    rows = {name: tables[f"t_{name}"].method.num_params(1, 32) // 32 for name in ("user", "item", "zip")}
    assert rows["item"] / rows["user"] == pytest.approx(1682 / 943, rel=0.03)
    assert rows["zip"] / rows["user"] == pytest.approx(795 / 943, rel=0.03)


@pytest.mark.parametrize("method", COMPRESSING)
def test_error_names_the_largest_compression_that_works(method: str) -> None:
    with pytest.raises(UsageError, match="at most") as caught:
        plan_tables(INFO, config(method, 1000.0))
    found = re.search(r"at most ([\d.]+) works here", str(caught.value))
    assert found is not None
    largest = float(found.group(1))
    plan_tables(INFO, config(method, largest * 0.999))
    with pytest.raises(UsageError):
        plan_tables(INFO, config(method, largest * 1.01))


def test_options_and_seed_reach_every_compressed_table() -> None:
    tables = plan_tables(INFO, config("cce", 8.0, method_options={"num_columns": 4}, seed=9))
    chosen = [table.method for table in tables if table.method.key == "cce"]
    assert len(chosen) == 3
    assert all((method.num_columns, method.seed) == (4, 9) for method in chosen)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["cce", "hashing_trick", "robe", "full"])
def test_a_cap_is_kept_by_every_table(method: str) -> None:
    """Tables that fit it stay full, whatever their number of rows; the others use it up."""
    if method == "full":
        with pytest.raises(UsageError, match="--method full cannot have --max_params_per_table 2400"):
            config(method, max_params_per_table=2400)
        return
    tables = {table.name: table for table in plan_tables(INFO, config(method, max_params_per_table=2400))}
    for name, rows in ROWS.items():
        table = tables[f"t_{name}"]
        fits = rows * 32 <= 2400
        assert table.method.key == ("full" if fits else method)
        assert fits or 2300 < table.method.num_params(rows, 32) <= 2400


def test_a_cap_that_is_too_small_is_an_error() -> None:
    with pytest.raises(UsageError, match="--max_params_per_table 10 with --method cce: table 'user'"):
        plan_tables(INFO, config("cce", max_params_per_table=10))


def counted(busy: str) -> DatasetInfo:
    """All lookups but one a table go to the ids of one of them, evenly."""

    def count() -> dict[str, np.ndarray]:
        return {name: np.full(rows, 1_000_000 if name == busy else 1) for name, rows in ROWS.items()}

    return replace(INFO, count_lookups=count)


def test_bytes_go_to_the_tables_that_are_looked_up() -> None:
    """As plan_compression is asked for; its choice is tested with it."""
    wanted = config("hashing_trick", budget_bytes=200_000, seed=9)
    sizes = {}
    for busy in ("user", "item"):
        tables = plan_tables(counted(busy), wanted)
        sizes[busy] = {table.name: table.method.num_params(table.num_embeddings, 32) for table in tables}
        assert {table.method.seed for table in tables if table.method.key != "full"} == {9}  # type: ignore[attr-defined]
    assert sizes["user"]["t_user"] > sizes["item"]["t_user"]
    assert sizes["item"]["t_item"] > sizes["user"]["t_item"]


@pytest.mark.parametrize(
    ("method", "message"),
    [("cce", "--budget_bytes 1000: .* the smallest that works is"), ("robe", "has 'robe', whose loss has no model")],
)
def test_bytes_that_cannot_be_planned_are_an_error(method: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_tables(INFO, config(method, budget_bytes=1000))


def test_tables_are_sized_in_one_way() -> None:
    with pytest.raises(UsageError, match="--compression 8 and --budget_bytes 1000 are different ways"):
        config("cce", 8.0, budget_bytes=1000)
