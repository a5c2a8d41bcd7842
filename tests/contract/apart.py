"""The contract on a method that is not in the registry."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torchrec.modules.embedding_configs import DataType, PoolingType

from tests.contract import test_budgets, test_collection, test_lookup, test_state
from tests.contract.cases import Variant

_CHOICES: dict[str, list[Any]] = {
    "pooling": [PoolingType.SUM, PoolingType.MEAN],
    "is_weighted": [False, True],
    "data_type": [DataType.FP16, DataType.BF16],
}


def contract() -> list[Callable[..., None]]:
    """The tests of the contract that ask for nothing but a method and ways to pool."""
    modules = (test_lookup, test_budgets, test_collection, test_state)
    tests = [
        f for module in modules for name, f in inspect.getmembers(module, inspect.isfunction) if name[:5] == "test_"
    ]
    wanted = [set(inspect.signature(test).parameters) for test in tests]
    known = {"variant", *_CHOICES}
    return [test for test, names in zip(tests, wanted, strict=True) if "variant" in names and names <= known]


def run(test: Callable[..., None], key: str) -> None:
    """One test of the contract, pooling in every way."""
    names = [name for name in inspect.signature(test).parameters if name != "variant"]
    for values in itertools.product(*(_CHOICES[name] for name in names)):
        test(variant=Variant(key, {}), **dict(zip(names, values, strict=True)))
