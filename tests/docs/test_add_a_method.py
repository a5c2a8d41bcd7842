"""docs/add_a_method.md, followed literally: its code becomes a file, gets its line in `METHODS` and meets the contract."""

import doctest
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import METHODS, CompressedEmbeddingBagCollection, CompressionRule, methods, swap
from tests.contract import test_budgets, test_collection, test_lookup, test_state
from tests.contract.cases import Variant, decode, make_table, parameters
from tests.docs.markdown import ROOT, blocks
from tests.unit.oracles import make_kjt

V, D = 50, 8
BAGS = [[3], [], [7, 7, 0], [49, 0, 20]]
CHOICES: dict[str, list[Any]] = {
    "variant": [Variant("two_tables", {})],
    "pooling": [PoolingType.SUM, PoolingType.MEAN],
    "is_weighted": [False, True],
}


@pytest.fixture
def two_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's code as a module, and its class in the registry while the test runs."""
    (block,) = blocks(ROOT / "docs" / "add_a_method.md", "python")
    file = tmp_path / "two_tables.py"
    file.write_text(block.text)
    spec = importlib.util.spec_from_file_location("two_tables", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "two_tables", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, module.TwoTables.key, module.TwoTables)  # the dict that every module shares
    assert methods.METHODS is swap.METHODS is METHODS
    return module


def test_vectors_are_means_of_a_row_of_each_table(two_tables: ModuleType) -> None:
    method = two_tables.TwoTables(num_rows=20)
    collection = CompressedEmbeddingBagCollection(tables=[make_table(method, num_embeddings=V, feature_names=["f"])])
    rows_VR = collection.lowered_tables[0].row_map.rows(torch.arange(V))[0]
    weight = parameters(collection)["t"]
    dense_VD = (weight[rows_VR[:, 0]] + weight[rows_VR[:, 1]]) / 2
    torch.testing.assert_close(collection.dense_weight("t"), dense_VD.detach())
    torch.testing.assert_close(decode(collection, "t", parameters(collection)), dense_VD)
    pooled = torch.stack([dense_VD[torch.tensor(bag, dtype=torch.int64)].sum(dim=0) for bag in BAGS])
    torch.testing.assert_close(collection(make_kjt({"f": BAGS}))["f"], pooled)
    assert set(rows_VR[:, 0].tolist()) <= set(range(20))
    assert set(rows_VR[:, 1].tolist()) == set(range(20, 25))


def test_rules_know_it(two_tables: ModuleType) -> None:
    rule = CompressionRule(method="two_tables", compression=5)
    assert rule.method_for(1000, D) == two_tables.TwoTables(num_rows=160)


def test_its_docstrings_example(two_tables: ModuleType) -> None:
    assert doctest.testmod(two_tables) == doctest.TestResults(failed=0, attempted=1)


def contract() -> list[Callable[..., None]]:
    """The tests of the contract that ask for nothing but a method and ways to pool."""
    modules = (test_lookup, test_budgets, test_collection, test_state)
    tests = [
        f for module in modules for name, f in inspect.getmembers(module, inspect.isfunction) if name[:5] == "test_"
    ]
    wanted = [set(inspect.signature(test).parameters) for test in tests]
    return [test for test, names in zip(tests, wanted, strict=True) if "variant" in names and names <= CHOICES.keys()]


@pytest.mark.usefixtures("two_tables")
@pytest.mark.parametrize("test", contract(), ids=lambda test: test.__name__)
def test_it_meets_the_contract(test: Callable[..., None]) -> None:
    names = list(inspect.signature(test).parameters)
    for values in itertools.product(*(CHOICES[name] for name in names)):
        test(**dict(zip(names, values, strict=True)))
