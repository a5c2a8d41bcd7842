"""Every method: how many parameters it has, and the largest instance within a budget."""

import dataclasses
import math

import pytest

from cce_torchrec import METHODS, QR, CompressedEmbeddingBagCollection
from tests.contract.cases import VARIANTS, Variant, budgets, make_table, parameters, smallest_budget

SIZES = [(1, 4), (2, 8), (7, 4), (50, 8), (100, 12), (1000, 16)]

every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "V{}-D{}".format(*size))


def test_the_registry_names_its_methods() -> None:
    assert {"full", "hashing_trick", "ce", "qr", "cce"} <= set(METHODS)
    assert all(method.key == key for key, method in METHODS.items())


@every_size
@every_method
def test_num_params_counts_the_parameters(variant: Variant, size: tuple[int, int]) -> None:
    for budget in budgets(variant, *size):
        method = variant.from_budget(*size, budget)
        table = make_table(method, num_embeddings=size[0], embedding_dim=size[1])
        actual = sum(p.numel() for p in parameters(CompressedEmbeddingBagCollection(tables=[table])).values())
        assert method.num_params(*size) == actual <= budget


@every_size
@every_method
def test_the_smallest_budget_is_the_one_that_is_named(variant: Variant, size: tuple[int, int]) -> None:
    smallest = smallest_budget(variant, *size)
    assert variant.from_budget(*size, smallest).num_params(*size) <= smallest
    with pytest.raises(ValueError, match=rf"\b{smallest}\b"):
        variant.from_budget(*size, smallest - 1)


@every_size
@every_method
def test_nothing_larger_fits(variant: Variant, size: tuple[int, int]) -> None:
    largest_of_all = variant.from_budget(*size, 10**9)  # more rows than that would lie idle
    for budget in budgets(variant, *size):
        method = variant.from_budget(*size, budget)
        if method == largest_of_all:
            continue
        for field in dataclasses.fields(method):
            value = getattr(method, field.name)
            is_size = isinstance(value, int) and field.name != "num_hashes"  # a choice, which budgets leave alone
            for step in (1, 2, 5) if is_size else ():
                try:
                    needed = dataclasses.replace(method, **{field.name: value + step}).num_params(*size)
                except ValueError:  # such as a number of columns that does not divide the dim
                    continue
                assert not method.num_params(*size) < needed <= budget, f"{method}, {field.name} + {step}"


@every_method
def test_a_larger_budget_never_gives_less(variant: Variant) -> None:
    smallest = smallest_budget(variant, 30, 8)
    sizes = [variant.from_budget(30, 8, budget).num_params(30, 8) for budget in range(smallest, smallest + 200)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("operation", ["add", "concat"])
@pytest.mark.parametrize("num_embeddings", range(1, 40))
def test_qr_is_the_best_of_all_remainders(num_embeddings: int, operation: str) -> None:
    width = 8 if operation == "add" else 4

    def brute_force(remainders: int) -> int:
        return (remainders + math.ceil(num_embeddings / remainders)) * width

    sizes = [brute_force(remainders) for remainders in range(1, num_embeddings + 1)]
    for budget in range(min(sizes), max(sizes) + 2 * width, 3):
        method = QR.from_budget(num_embeddings, 8, budget, operation=operation)
        assert brute_force(method.num_remainders) == method.num_params(num_embeddings, 8)
        assert method.num_params(num_embeddings, 8) == max(size for size in sizes if size <= budget)
    with pytest.raises(ValueError, match=rf"\b{min(sizes)}\b"):
        QR.from_budget(num_embeddings, 8, min(sizes) - 1, operation=operation)


@every_method
def test_a_budget_for_no_table(variant: Variant) -> None:
    with pytest.raises(ValueError, match="num_embeddings=0 "):
        variant.from_budget(0, 8, 100)
    with pytest.raises(ValueError, match="embedding_dim=-4 "):
        variant.from_budget(8, -4, 100)


GRID = [(v, d) for v in (10, 100, 1_000, 100_000, 10_000_000) for d in (4, 16, 64, 128)]


@every_method
def test_budgets_are_used_up_to_a_twentieth_or_the_docstring_names_the_sizes(variant: Variant) -> None:
    """From the smallest instance to the full table; a method of fewer sizes says "Sizes:" and which, in its docstring."""
    names_its_sizes = "Sizes:" in (variant.method.__doc__ or "")
    for size in GRID:
        smallest, largest = smallest_budget(variant, *size), size[0] * size[1]
        most = variant.from_budget(*size, max(smallest, 2 * largest)).num_params(*size)  # more would lie idle
        for factor in (1, 2.7, 10, 31, 100, 1000):
            budget = min(largest, int(smallest * factor))
            if budget < smallest:
                continue
            used = variant.from_budget(*size, budget).num_params(*size)
            assert used <= budget
            if used == most:
                continue
            # What a single row more, or a column's, costs may be more than a twentieth of a small budget.
            slack = max(0.05 * budget, 2 * size[1], smallest)
            assert names_its_sizes or used >= budget - slack or factor == 1, f"{used} of {budget} for {size}"
