"""docs/add_a_method.md, followed literally: its code becomes files, gets its lines in `METHODS` and meets the contract."""

import doctest
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cce_torchrec import METHODS, CompressedEmbeddingBagCollection, CompressionRule, methods
from cce_torchrec.swap import rules
from tests.contract.apart import contract, run
from tests.contract.cases import decode, make_table, parameters
from tests.docs.markdown import ROOT, blocks
from tests.unit.oracles import make_kjt

V, D = 50, 8
BAGS = [[3], [], [7, 7, 0], [49, 0, 20]]
CLASSES = {"two_tables": "TwoTables", "product": "Product"}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The page's code as modules, and its classes in the registry while the test runs."""
    modules = {}
    for (key, class_name), block in zip(
        CLASSES.items(), blocks(ROOT / "docs" / "add_a_method.md", "python"), strict=True
    ):
        file = tmp_path / f"{key}.py"
        file.write_text(block.text)
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec is not None
        assert spec.loader is not None
        modules[key] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, key, modules[key])
        spec.loader.exec_module(modules[key])
        monkeypatch.setitem(METHODS, key, getattr(modules[key], class_name))  # the dict that every module shares
        assert METHODS[key].key == key
    assert methods.METHODS is rules.METHODS is METHODS
    return modules


def assert_decodes_to(collection: CompressedEmbeddingBagCollection, dense_VD: torch.Tensor) -> None:
    torch.testing.assert_close(collection.dense_weight("t"), dense_VD.detach())
    torch.testing.assert_close(decode(collection, "t", parameters(collection)), dense_VD)
    pooled = torch.stack([dense_VD[torch.tensor(bag, dtype=torch.int64)].sum(dim=0) for bag in BAGS])
    torch.testing.assert_close(collection(make_kjt({"f": BAGS}))["f"], pooled)


def build(page: dict[str, ModuleType], key: str, num_rows: int) -> CompressedEmbeddingBagCollection:
    method = getattr(page[key], CLASSES[key])(num_rows=num_rows)
    return CompressedEmbeddingBagCollection(tables=[make_table(method, num_embeddings=V, feature_names=["f"])])


def test_vectors_are_means_of_a_row_of_each_table(page: dict[str, ModuleType]) -> None:
    collection = build(page, "two_tables", 20)
    rows_VR = collection.lowered_tables[0].row_map.rows(torch.arange(V))[0]
    weight = parameters(collection)["t"]
    assert_decodes_to(collection, (weight[rows_VR[:, 0]] + weight[rows_VR[:, 1]]) / 2)
    assert set(rows_VR[:, 0].tolist()) <= set(range(20))
    assert set(rows_VR[:, 1].tolist()) == set(range(20, 25))


def test_vectors_are_products_of_two_rows(page: dict[str, ModuleType]) -> None:
    collection = build(page, "product", 20)
    (weight,) = collection.parameters()
    first_V, second_V = page["product"].hash_rows(
        torch.arange(V), collection.decoded_tables[0].decoder.coefficients, 20
    )
    assert_decodes_to(collection, weight[first_V] * weight[20 + second_V])
    assert (first_V != second_V).any()


def test_rules_know_them(page: dict[str, ModuleType]) -> None:
    assert CompressionRule(method="two_tables", compression=5).method_for(1000, D) == page["two_tables"].TwoTables(
        num_rows=160
    )
    assert CompressionRule(method="product", compression=5).method_for(1000, D) == page["product"].Product(num_rows=100)


@pytest.mark.parametrize("key", CLASSES)
def test_its_docstrings_example(page: dict[str, ModuleType], key: str) -> None:
    assert doctest.testmod(page[key]) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("key", CLASSES)
@pytest.mark.parametrize("test", contract(), ids=lambda test: test.__name__)
def test_they_meet_the_contract(test: Callable[..., None], key: str) -> None:
    run(test, key)
