"""Code in the README, in docs/ and in docstrings runs, and prints what the page says."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cce_torchrec
from cce_torchrec import METHODS
from tests.docs.markdown import PAGES, ROOT, blocks

MODULES = sorted(["cce_torchrec", *(m.name for m in pkgutil.walk_packages(cce_torchrec.__path__, "cce_torchrec."))])


@pytest.fixture
def one_rank() -> Iterator[None]:
    """The process group that a reader has when torchrun started their script."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in blocks(page, "python"):
            exec(compile(block.text, str(page), "exec"), names)
    printed = capsys.readouterr().out.strip()
    if page.name == "README.md":
        assert printed, "the README's example prints a memory report"
    if printed:
        shown = [block.text.strip() for block in blocks(page, "text")]
        assert printed in shown, f"{page.name} should show:\n{printed}"


def test_the_readmes_example_stays_short() -> None:
    lines = blocks(ROOT / "README.md", "python")[0].text.splitlines()
    code = [line for line in lines if line and not line.startswith(("import", "from", "#"))]
    assert len(code) <= 16


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")  # as meant
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "see the captured output"


def test_every_method_has_an_example() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for method in METHODS.values():
        assert any(test.examples for test in finder.find(method)), method
