"""Triton's kernels without a GPU: its interpreter runs them, in a process of its own, and its compiler compiles them."""

import multiprocessing
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # torchmetrics 1.0.3 compares versions by distutils when it is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchmetrics  # noqa: F401

Run = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="Triton is made for Linux on x86_64"))


def _begin() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module=r"cce_torchrec\b")


def _process(environment: dict[str, str]) -> Iterator[Run]:
    """Runs functions in a process that begins with these variables set; its modules see them when they are imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(int).result()  # starts the process
        yield lambda fn, *args: pool.submit(fn, *args).result()


@pytest.fixture(scope="package")
def interpreter() -> Iterator[Run]:
    """``interpreter(fn, *args)``: where the interpreter runs the kernels, for tensors on the CPU."""
    yield from _process({"TRITON_INTERPRET": "1", "CCE_TORCHREC_TRITON": "1"})


@pytest.fixture(scope="package")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``compiler(fn, *args)``: where kernels can be compiled, for GPUs that are not there."""
    yield from _process({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))})
