"""`make quickstart`, shortened, and the benchmark's table."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from dlrm_example import quickstart
from dlrm_example.records import Summary, read_metrics, read_summary
from tests.scripts import load_benchmark


def test_quickstart_leaves_a_table_and_a_picture(
    tmp_path: Path, data_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of = quickstart.movielens_config
    small = {"data_path": data_path, "limit_train_batches": 8, "validation_freq_within_epoch": 4}
    monkeypatch.setattr(
        quickstart, "movielens_config", lambda method, run_dir, **rest: config_of(method, run_dir, **{**rest, **small})
    )
    assert quickstart.main(["--run_dir", str(tmp_path), "--epochs", "1"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "quickstart.png") in shown
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    runs = {method: read_summary(tmp_path / method) for method in quickstart.METHODS}
    assert all(f"{run.best_val_bce:.4f}" in shown for run in runs.values())
    assert runs["full"].compression_params == 1
    assert runs["hashing_trick"].embedding_params == runs["cce"].embedding_params
    assert 8 <= runs["cce"].compression_params < 8.1
    assert [row["step"] for row in read_metrics(tmp_path / "full") if row.get("split") == "val"] == [4, 8]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("movielens_8x")


def runs_of(benchmark: ModuleType) -> list[Summary]:
    base = Summary(
        **{"method": "full", "embedding_params": 1000, "full_embedding_params": 8000, "compression_params": 8.0},
        **{"compression_bytes": 6.0, "best_val_bce": 0.5, "best_val_auroc": 0.8, "best_step": 1, "best_epoch": 1},
        **{"test_bce": 0.6, "test_auroc": 0.7, "steps": 1, "train_seconds": 1.0, "recluster_seconds": 0.0},
        **{"reclusterings": 0, "world_size": 1, "seed": 1},
    )
    bce = {"hashing_trick": 0.6, "cce": 0.55}
    return [
        replace(base, method=method, seed=seed, best_val_bce=bce.get(method, 0.5) + 0.01 * seed)
        for method in benchmark.METHODS
        for seed in benchmark.SEEDS
    ]


def test_benchmark_table(benchmark: ModuleType) -> None:
    runs = runs_of(benchmark)
    lines = benchmark.markdown_table(runs).splitlines()
    assert len(lines) == 2 + len(benchmark.METHODS)
    assert "| `cce` | 1,000 | 8.0x | 6.0x | 0.6050 ± 0.0303 |" in lines[2 + benchmark.METHODS.index("cce")]
    assert benchmark.margins(runs)["cce"] == pytest.approx([0.05] * 10)


def test_benchmark_replaces_only_between_the_markers(benchmark: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- movielens_8x:start -->\nold\n<!-- movielens_8x:end -->\nafter\n")
    for _ in range(2):
        benchmark.replace_in_readme(readme, "| new |")
    text = "before\n<!-- movielens_8x:start -->\n| new |\n<!-- movielens_8x:end -->\nafter\n"
    assert readme.read_text() == text
    readme.write_text("no markers")
    benchmark.replace_in_readme(readme, "| new |")
    assert readme.read_text() == "no markers"
    benchmark.replace_in_readme(tmp_path / "missing.md", "| new |")
