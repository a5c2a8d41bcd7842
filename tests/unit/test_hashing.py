"""Hash functions: the documented formula, uniform, independent, and the same on every machine."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from cce_torchrec.hashing import MAX_ROWS, hash_coefficients, hash_rows, mix64
from cce_torchrec.methods import CCE, HashingTrick
from cce_torchrec.methods.cce import CCERowMap
from tests.unit.oracles import python_hash, python_mix64, uniformity

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IDS = 1_000_000
# Fixed seeds, so nothing is flaky; a fair hash passes 4.5 standard deviations but for 1 in 150,000 such draws.
LIMIT = 4.5
SOME_IDS = [0, 1, 2, 255, 2**31, 2**40, 2**63 - 1, -1, -2, -(2**31), -(2**63)]


@pytest.mark.parametrize("word", SOME_IDS)
def test_mix64_is_the_splitmix64_finaliser(word: int) -> None:
    assert int(mix64(torch.tensor([word]))) % 2**64 == python_mix64(word % 2**64)


def test_mix64_known_answer() -> None:
    # The first output of splitmix64 from seed 0, as published with the generator.
    golden = 0x9E3779B97F4A7C15 - 2**64
    assert int(mix64(torch.tensor([golden]))) % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("num_rows", [1, 2, 37, 1000, 1024, 65_537, MAX_ROWS])
def test_formula_on_python_integers(num_rows: int) -> None:
    rows_FN = hash_rows(torch.tensor(SOME_IDS), hash_coefficients(3, 5, "table", "ce"), num_rows)
    expected = [[python_hash(number, num_rows, f, 5, "table", "ce") for number in SOME_IDS] for f in range(3)]
    assert rows_FN.tolist() == expected


@pytest.mark.parametrize("num_rows", [37, 1000, 1024, 65_537])
@pytest.mark.parametrize("stride", [1, 2**8, 2**20, 2**40], ids=["consecutive", "x2^8", "x2^20", "x2^40"])
def test_uniform_by_chi_square(stride: int, num_rows: int) -> None:
    rows_FN = hash_rows(torch.arange(NUM_IDS) * stride, hash_coefficients(2, "uniform"), num_rows)
    assert int(rows_FN.min()) >= 0
    for rows_N in rows_FN:
        assert abs(uniformity(rows_N, num_rows)) < LIMIT


def test_the_chi_square_would_see_a_poor_hash() -> None:
    ids = torch.arange(NUM_IDS)
    assert uniformity(ids % 1000, 1000) < -LIMIT  # too even to be random
    assert uniformity(ids * 2**20 % 1024, 1024) > LIMIT
    assert uniformity(hash_rows(ids, hash_coefficients(1, "uniform"), 1024)[0] // 2 * 2, 1024) > LIMIT


@pytest.mark.parametrize("num_rows", [37, 1000])
@pytest.mark.parametrize("stride", [1, 2**8, 2**20, 2**40], ids=["consecutive", "x2^8", "x2^20", "x2^40"])
def test_functions_of_a_family_are_independent(stride: int, num_rows: int) -> None:
    rows_FN = hash_rows(torch.arange(NUM_IDS) * stride, hash_coefficients(3, "joint"), num_rows)
    for first_N, second_N in itertools.combinations(rows_FN, 2):
        assert abs(uniformity(first_N * num_rows + second_N, num_rows**2)) < LIMIT


def test_three_functions_together_are_independent() -> None:
    first_N, second_N, third_N = hash_rows(torch.arange(NUM_IDS), hash_coefficients(3, "triple"), 50)
    assert abs(uniformity((first_N * 50 + second_N) * 50 + third_N, 50**3)) < LIMIT


@pytest.mark.parametrize("stride", [1, 2**40], ids=["consecutive", "x2^40"])
def test_ids_collide_in_two_functions_as_often_as_by_chance(stride: int) -> None:
    num_rows, pairs = 20_000, NUM_IDS**2 / 2
    expected = pairs / num_rows**2
    for family in range(3):
        first_N, second_N = hash_rows(torch.arange(NUM_IDS) * stride, hash_coefficients(2, family), num_rows)
        counts = torch.unique(first_N * num_rows + second_N, return_counts=True)[1].double()
        collisions = float((counts * (counts - 1) / 2).sum())
        assert abs(collisions - expected) < LIMIT * expected**0.5  # about Poisson


@pytest.mark.parametrize(
    ("one", "other"),
    [(("t", 0), ("t", 1)), (("t", 0), ("u", 0)), ((0, "t", "cce", "main"), (0, "t", "cce", "helper", 0))],
    ids=["seeds", "tables", "purposes"],
)
def test_families_of_different_keys_are_independent(one: tuple, other: tuple) -> None:
    ids = torch.arange(NUM_IDS)
    first_N, second_N = (hash_rows(ids, hash_coefficients(1, *key), 256)[0] for key in (one, other))
    assert abs(uniformity(first_N * 256 + second_N, 256**2)) < LIMIT


def test_cce_main_helper_and_next_helper_are_independent() -> None:
    row_map = CCE(num_rows=200, num_columns=1).row_map("t", NUM_IDS, 4, None)
    assert isinstance(row_map, CCERowMap)
    ids = torch.arange(NUM_IDS)
    main, helper = row_map.main_rows(ids)[0], row_map.helper_rows(ids)[0]
    next_helper = hash_rows(ids, row_map.draw_helper_coefficients(1), 200)[0]
    for first_N, second_N in ((main, helper), (helper, next_helper), (main, next_helper)):
        assert abs(uniformity(first_N * 200 + second_N, 200**2)) < LIMIT


def test_the_sign_of_an_id_is_independent_of_its_row() -> None:
    row_map = HashingTrick(num_rows=100, sign=True).row_map("t", NUM_IDS, 4, None)
    ids = torch.arange(NUM_IDS)
    sides_N = (row_map.row_weights(ids).view(-1).long() + 1) // 2
    assert abs(uniformity(row_map.rows(ids).view(-1) * 2 + sides_N, 200)) < LIMIT


def test_zero_and_negative_ids_are_ordinary() -> None:
    # Over many functions, each of these ids must itself be spread evenly.
    families = [hash_coefficients(200, "id", index) for index in range(100)]
    for number in (0, -1, -(2**63), 2**63 - 1):
        rows = torch.cat([hash_rows(torch.tensor([number]), family, 64).view(-1) for family in families])
        assert abs(uniformity(rows, 64)) < LIMIT
    negative = hash_rows(-torch.arange(NUM_IDS), hash_coefficients(1, "id"), 1000)[0]
    assert abs(uniformity(negative, 1000)) < LIMIT


def test_int32_ids_hash_as_int64() -> None:
    ids, family = torch.tensor([0, 5, -5, 2**31 - 1]), hash_coefficients(2, 0)
    assert torch.equal(hash_rows(ids.int(), family, 1000), hash_rows(ids, family, 1000))


def test_a_key_is_its_parts_not_their_concatenation() -> None:
    assert hash_coefficients(1, "ab", "c").tolist() != hash_coefficients(1, "a", "bc").tolist()


@pytest.mark.parametrize("num_rows", [0, -3, 2**31])
def test_bad_range(num_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"num_rows={num_rows} "):
        hash_rows(torch.arange(3), hash_coefficients(1, 0), num_rows)


def test_same_in_another_process() -> None:
    spec = importlib.util.find_spec("cce_torchrec.hashing")
    assert spec is not None
    program = (
        "import runpy, sys, torch; h = runpy.run_path(sys.argv[1]); "
        "print(h['hash_rows'](torch.arange(5), h['hash_coefficients'](2, 3, 'table'), 1000).tolist())"
    )
    here = hash_rows(torch.arange(5), hash_coefficients(2, 3, "table"), 1000).tolist()
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-W", "ignore", "-c", program, str(spec.origin)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(here)
