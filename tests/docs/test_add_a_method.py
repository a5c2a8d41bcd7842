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
    "variant": [Variant("two_hashes", {})],
    "pooling": [PoolingType.SUM, PoolingType.MEAN],
    "is_weighted": [False, True],
}


@pytest.fixture
def two_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's code as a module, and its class in the registry while the test runs."""
    (block,) = blocks(ROOT / "docs" / "add_a_method.md", "python")
    file = tmp_path / "two_hashes.py"
    file.write_text(block.text)
    spec = importlib.util.spec_from_file_location("two_hashes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "two_hashes", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, module.TwoHashes.key, module.TwoHashes)  # the dict that every module shares
    assert methods.METHODS is swap.METHODS is METHODS
    return module


def test_vectors_are_means_of_two_rows(two_hashes: ModuleType) -> None:
    method = two_hashes.TwoHashes(num_rows=20)
    collection = CompressedEmbeddingBagCollection(tables=[make_table(method, num_embeddings=V, feature_names=["f"])])
    rows_VR = collection.lowered_tables[0].row_map.rows(torch.arange(V))[0]
    weight = parameters(collection)["t"]
    dense_VD = (weight[rows_VR[:, 0]] + weight[rows_VR[:, 1]]) / 2
    torch.testing.assert_close(collection.dense_weight("t"), dense_VD.detach())
    torch.testing.assert_close(decode(collection, "t", parameters(collection)), dense_VD)
    pooled = torch.stack([dense_VD[torch.tensor(bag, dtype=torch.int64)].sum(dim=0) for bag in BAGS])
    torch.testing.assert_close(collection(make_kjt({"f": BAGS}))["f"], pooled)
    assert (rows_VR[:, 0] != rows_VR[:, 1]).any()


def test_rules_know_it(two_hashes: ModuleType) -> None:
    rule = CompressionRule(method="two_hashes", compression=5)
    assert rule.method_for(1000, D) == two_hashes.TwoHashes(num_rows=200)


def test_its_docstrings_example(two_hashes: ModuleType) -> None:
    assert doctest.testmod(two_hashes) == doctest.TestResults(failed=0, attempted=1)


def contract() -> list[Callable[..., None]]:
    """The tests of the contract that ask for nothing but a method and ways to pool."""
    modules = (test_lookup, test_budgets, test_collection, test_state)
    tests = [
        f for module in modules for name, f in inspect.getmembers(module, inspect.isfunction) if name[:5] == "test_"
    ]
    wanted = [set(inspect.signature(test).parameters) for test in tests]
    return [test for test, names in zip(tests, wanted, strict=True) if "variant" in names and names <= CHOICES.keys()]


@pytest.mark.usefixtures("two_hashes")
@pytest.mark.parametrize("test", contract(), ids=lambda test: test.__name__)
def test_it_meets_the_contract(test: Callable[..., None]) -> None:
    names = list(inspect.signature(test).parameters)
    for values in itertools.product(*(CHOICES[name] for name in names)):
        test(**dict(zip(names, values, strict=True)))
