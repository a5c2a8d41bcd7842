"""The arithmetic and the words of `benchmarks/two_ranks.py`."""

from types import ModuleType, SimpleNamespace

import pytest

from tests.scripts import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("two_ranks")


def compared(benchmark: ModuleType, shift: float) -> dict:
    """Seeds 0.01 apart, two ranks all shifted, the control exactly like one rank."""
    one = [0.5 + 0.01 * seed for seed in range(len(benchmark.SEEDS))]
    scores = {"one": one, "two": [score + shift for score in one], "control": one}
    runs = {arm: [SimpleNamespace(best_val_bce=score) for score in scores[arm]] for arm in scores}
    return benchmark.compare(runs, "best_val_bce")


def test_agreement_is_two_standard_errors(benchmark: ModuleType) -> None:
    error = compared(benchmark, 0.0)["standard_error"]
    variance = 0.01**2 * (len(benchmark.SEEDS) ** 2 + len(benchmark.SEEDS)) / 12  # of equally spaced numbers
    assert error == pytest.approx((2 * variance / len(benchmark.SEEDS)) ** 0.5)
    for shift, agree in ((1.9, True), (-1.9, True), (2.1, False), (-2.1, False)):
        found = compared(benchmark, shift * error)
        assert found["within_seed_noise"] == agree
        assert found["two_minus_one"] == pytest.approx([shift * error] * len(benchmark.SEEDS))
        assert found["mean_difference"] == pytest.approx(shift * error)
        assert ("do **not** agree" in benchmark._section("BCE", found)) == (not agree)


def test_both_runs_have_the_same_rows_a_step(benchmark: ModuleType) -> None:
    commands = {arm: benchmark.command(3, arm) for arm in ("one", "two")}
    sizes = {arm: int(words[words.index("--batch_size") + 1]) for arm, words in commands.items()}
    assert sizes == {"one": 1024, "two": 512}
    assert commands["two"][:3] == ["torchrun", "--nproc_per_node", "2"]
    assert commands["one"][-3:-1] == ["3", "--run_dir"]
