"""The arithmetic and the words of `benchmarks/methods.py`."""

import json
from types import ModuleType

import pytest

from cce_torchrec import METHODS
from dlrm_example.budget import full_params, num_params, plan_tables
from dlrm_example.sweep.results import Results
from tests.example.test_budget import INFO
from tests.scripts import ROOT, load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("methods")


def test_every_method_fits_every_budget(benchmark: ModuleType) -> None:
    assert {case.method for case in benchmark.cases()} == set(METHODS)
    for case in benchmark.cases():
        config = benchmark.config(case)
        assert num_params(plan_tables(INFO, config)) <= full_params(INFO, config.embedding_dim) / case.compression


def test_settings_are_the_same_for_all_methods(benchmark: ModuleType) -> None:
    configs = [vars(benchmark.config(case)) for case in benchmark.cases()]
    differ = {name for name in configs[0] if len({str(config[name]) for config in configs}) > 1}
    assert differ == {"method", "compression", "seed", "run_dir"}


def test_the_page_shows_the_recorded_numbers(benchmark: ModuleType) -> None:
    content = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
    runs, cases = content["runs"], benchmark.cases()
    assert list(runs) == [case.name for case in cases]
    assert all((runs[case.name]["method"], runs[case.name]["seed"]) == (case.method, case.seed) for case in cases)
    results = Results({case: runs[case.name] for case in cases}, {})
    table = benchmark.results_table(results, content["step_seconds"])
    assert table in (ROOT / "docs" / "results" / "methods.md").read_text()
    row_methods, decode_methods = benchmark.draw(results).axes
    drawn = [line.get_label() for axes in (row_methods, decode_methods) for line in axes.get_lines()]
    assert sorted(set(drawn)) == sorted(METHODS)
