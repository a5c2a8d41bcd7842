"""Budgets: never exceeded, nearly used up, and the largest compression that an error names is the largest."""

import re

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


def config(method: str, compression: float, **changes: object) -> TrainConfig:
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
