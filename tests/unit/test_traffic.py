"""Statistics by one pass over Parquet, against the same counts given by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchrec import EmbeddingBagConfig

from cce_torchrec.planner.traffic import Traffic, traffic_of
from tests.unit.test_plan_compression import table


def test_statistics_from_parquet(tmp_path: Path) -> None:
    tables = [
        table("t_a", 10),
        EmbeddingBagConfig(name="t_b", num_embeddings=6, embedding_dim=16, feature_names=["b", "c"]),
    ]
    first = pa.table({"a": [1, 1, None], "b": [[0, 5], [], None], "c": pa.array([5, 5, 5], pa.int32()), "x": [0.5] * 3})
    second = pa.table({"a": [9, 1, 3], "b": [[2], [2], [2]], "c": pa.array([0, None, 5], pa.int32()), "x": [0.5] * 3})
    for name, part in (("1.parquet", first), ("2.parquet", second)):
        pq.write_table(part, tmp_path / name)
    from_parquet = traffic_of(tables, tmp_path)
    from_dict = traffic_of(tables, {"t_a": [0, 3, 0, 1, 0, 0, 0, 0, 0, 1], "t_b": [2, 0, 3, 0, 0, 5]})
    for name in ("t_a", "t_b"):
        assert from_parquet[name].lookups == from_dict[name].lookups
        np.testing.assert_allclose(from_parquet[name].shares_U, from_dict[name].shares_U)
        np.testing.assert_allclose(from_parquet[name].numbers_U, from_dict[name].numbers_U)
    assert from_parquet["t_b"].lookups == 10
    for wrong, says in (
        (table("t_d", 10), r"no columns \['d'\]"),
        (table("t_a", 9), "ids from 1 to 9"),
        (table("t_x", 9), "type double"),
    ):
        with pytest.raises(ValueError, match=says):
            traffic_of([wrong], tmp_path)


def test_lists_of_a_fixed_size(tmp_path: Path) -> None:
    pairs = pa.array([[1, 9], None, [1, 3], [None, 1]], pa.list_(pa.int16(), 2))
    pq.write_table(pa.table({"a": pairs}), tmp_path / "a.parquet")
    found, expected = traffic_of([table("t_a", 10)], tmp_path)["t_a"], Traffic.counted(np.array([3, 1, 1]))
    assert found.lookups == 5
    np.testing.assert_array_equal(found.shares_U, expected.shares_U)
    np.testing.assert_array_equal(found.numbers_U, expected.numbers_U)


def test_a_directory_without_parquet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory without Parquet files"):
        traffic_of([table("t_a", 10)], tmp_path)


def test_ids_are_counted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).zipf(1.3, 5000) % 1000
    pq.write_table(pa.table({"a": ids}), tmp_path / "a.parquet", row_group_size=300)
    monkeypatch.setattr("cce_torchrec.planner.traffic._MERGE_AT", 700)
    in_parts = traffic_of([table("t_a", 1000)], tmp_path)["t_a"]
    at_once = Traffic.counted(np.bincount(ids, minlength=1000))
    np.testing.assert_allclose(in_parts.shares_U, at_once.shares_U)
    np.testing.assert_allclose(in_parts.numbers_U, at_once.numbers_U)
