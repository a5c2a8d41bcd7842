"""The benchmark of the kernels: it refuses to run without a GPU, and what it measures is right where it can be run."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.conftest import Run
from tests.scripts import load_benchmark

benchmark = load_benchmark("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main(["--quick"])


def check_the_benchmark() -> None:
    cpu = torch.device("cpu")
    sizes = replace(benchmark.QUICK, batch_size=20, points=200)
    benchmark.check(sizes, cpu)
    results = benchmark.measure(sizes, cpu)
    assert results["bytes_of_a_forward"] == 2 * 20 * (8 + 8 + 32 + 4 * 32)
    assert all(len(values) == 2 and min(values) > 0 for values in results["milliseconds"].values())
    page = benchmark.page(sizes, results, {"command": "none"})
    assert f"| {results['forward_to_copy']:.2f} | 1.3 at most |" in page
    assert "full tables by FBGEMM" in page
    by, step = benchmark.full_way(sizes, cpu)
    assert by == "FBGEMM"
    step()


def test_it_checks_and_measures(interpreter: Run) -> None:
    interpreter(check_the_benchmark)
