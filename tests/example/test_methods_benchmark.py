"""The arithmetic and the words of `benchmarks/methods.py`, and the picture that it draws."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from cce_torchrec import METHODS
from dlrm_example import plots
from dlrm_example.budget import full_params, num_params, plan_tables
from dlrm_example.records import Summary
from tests.example.test_budget import INFO
from tests.scripts import ROOT, load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("methods")


def test_every_method_fits_every_budget(benchmark: ModuleType) -> None:
    assert {method for method, _ in benchmark.cases()} == set(METHODS)
    for method, compression in benchmark.cases():
        config = benchmark.config(method, compression, seed=1)
        assert num_params(plan_tables(INFO, config)) <= full_params(INFO, config.embedding_dim) / compression


def test_settings_are_the_same_for_all_methods(benchmark: ModuleType) -> None:
    configs = [vars(benchmark.config(*case, seed=1)) for case in benchmark.cases()]
    differ = {name for name in configs[0] if len({str(config[name]) for config in configs}) > 1}
    assert differ == {"method", "compression", "run_dir"}


def test_the_page_shows_the_recorded_numbers(benchmark: ModuleType) -> None:
    content = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
    runs, cases, seeds = [Summary(**run) for run in content["runs"]], benchmark.cases(), len(benchmark.SEEDS)
    assert len(runs) == len(cases) * seeds
    by_case = {case: runs[index * seeds : (index + 1) * seeds] for index, case in enumerate(cases)}
    assert all({run.method for run in found} == {case[0]} for case, found in by_case.items())
    num_bytes = dict(zip(cases, content["bytes"], strict=True))
    table = benchmark.results_table(by_case, num_bytes, content["step_seconds"])
    assert table in (ROOT / "docs" / "results" / "methods.md").read_text()


def test_bands_are_means_and_standard_deviations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    fill_between = Axes.fill_between
    monkeypatch.setattr(Axes, "fill_between", lambda *args, **kw: drawn.append(args[1:]) or fill_between(*args, **kw))
    curve = [(200, [0.4, 0.6]), (100, [0.7, 0.7])]
    plots.plot_bands({"left": {"level": [(300, [0.3])], "x": curve}, "right": {"y": curve}}, tmp_path / "a.png", "BCE")
    assert len(drawn) == 2
    params, low, high = drawn[0]
    assert params == [100, 200]
    assert low == pytest.approx([0.7, 0.5 - 0.02**0.5])
    assert high == pytest.approx([0.7, 0.5 + 0.02**0.5])
    assert imread(tmp_path / "a.png").shape[2] == 4
