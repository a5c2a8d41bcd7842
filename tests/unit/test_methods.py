"""Each method's own formula, written out on Python integers."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from cce_torchrec import CCE, CE, QR, Bloom, CompressedEmbeddingBagCollection, CompressedEmbeddingBagConfig, FullTable
from cce_torchrec import HashingTrick as Hashing
from cce_torchrec.methods import MethodConfig
from cce_torchrec.methods.base import id_chunks
from tests.unit.oracles import make_kjt, python_block, python_hash

V, D = 41, 8


def build(method: MethodConfig, num_embeddings: int = V) -> CompressedEmbeddingBagCollection:
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=D, feature_names=["f"], method=method
    )
    return CompressedEmbeddingBagCollection(tables=[table])


def weights(collection: CompressedEmbeddingBagCollection) -> list[Tensor]:
    return [parameter.detach() for parameter in collection.parameters()]


def test_full_is_the_table_itself() -> None:
    collection = build(FullTable())
    assert torch.equal(collection.dense_weight("t"), weights(collection)[0])
    assert torch.equal(collection.dense_weight("t"), collection.codebook("t"))


def test_hashing_trick_looks_up_the_hashed_row() -> None:
    collection = build(Hashing(num_rows=7, seed=3))
    (codebook,) = weights(collection)
    assert codebook.shape == (7, D)
    expected = [codebook[python_hash(v, 7, 0, 3, "t", "hashing_trick")] for v in range(V)]
    assert torch.equal(collection.dense_weight("t"), torch.stack(expected))


def test_signed_hashing_trick_multiplies_the_row_by_a_hashed_sign() -> None:
    collection = build(Hashing(num_rows=7, seed=3, sign=True))
    (codebook,) = weights(collection)
    key = (3, "t", "hashing_trick")
    signs = [2 * python_hash(v, 2, 0, *key, "sign") - 1 for v in range(V)]
    assert set(signs) == {-1, 1}
    expected = [signs[v] * codebook[python_hash(v, 7, 0, *key)] for v in range(V)]
    assert torch.equal(collection.dense_weight("t"), torch.stack(expected))


def test_signs_make_inner_products_unbiased() -> None:
    # The feature vector of ids x is sum_v x_v s(v) e_{h(v)}; with signs <x, y> is kept on average (0902.2206, lemma 2).
    x, y = torch.randn(2, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    products: dict[bool, list[float]] = {False: [], True: []}
    for sign, found in products.items():
        for seed in range(400):
            row_map = Hashing(num_rows=5, seed=seed, sign=sign).row_map("t", V, 1, None)
            rows_V = row_map.rows(torch.arange(V)).view(V)
            signs_V = row_map.row_weights(torch.arange(V)).view(V).double() if sign else torch.ones_like(x)
            hashed = [torch.zeros(5, dtype=torch.float64).index_add_(0, rows_V, signs_V * z) for z in (x, y)]
            found.append(float(hashed[0] @ hashed[1]))
    inner, mean = float(x @ y), {sign: sum(found) / 400 for sign, found in products.items()}
    error = torch.tensor(products[True]).std() / 20
    assert abs(mean[True] - inner) < 4 * error
    assert mean[False] - inner > 20 * error


def test_rows_carry_weights_only_where_there_is_a_sign() -> None:
    def table(name: str, method: MethodConfig) -> CompressedEmbeddingBagConfig:
        return CompressedEmbeddingBagConfig(
            name=name, num_embeddings=V, embedding_dim=D, feature_names=[name], method=method
        )

    for sign in (False, True):
        tables = [table("t", Hashing(num_rows=7, sign=sign)), table("u", CCE(num_rows=3, num_columns=2))]
        collection = CompressedEmbeddingBagCollection(tables=tables)
        assert not collection.is_weighted()
        assert collection._embedding_bag_collection.is_weighted() == sign
        rows = collection._rewrite(make_kjt({"t": [[1, 2], []], "u": [[], [3]]}))
        if sign:
            assert set(rows["t"].weights().tolist()) <= {-1.0, 1.0}
            assert rows["u:1"].weights().tolist() == [1.0, 1.0]
        else:
            assert rows.weights_or_none() is None


def test_a_hashing_trick_without_sign_is_stored_as_ever() -> None:
    assert Hashing(num_rows=7).layout(V, D) == f"hashing_trick(num_rows=7) {V}x{D} format 1"
    assert Hashing(num_rows=7, sign=True).layout(V, D) == f"hashing_trick(num_rows=7, sign=True) {V}x{D} format 1"
    assert not any("sign" in name for name in build(Hashing(num_rows=7)).state_dict())


@pytest.mark.parametrize("hashes", [1, 2, 4, 7])
def test_bloom_is_the_mean_of_hashed_rows(hashes: int) -> None:
    collection = build(Bloom(num_rows=11, num_hashes=hashes, seed=5))
    (codebook,) = weights(collection)
    assert codebook.shape == (11, D)
    rows = [[python_hash(v, 11, j, 5, "t", "bloom") for j in range(hashes)] for v in range(V)]
    expected = [sum(codebook[row] for row in of_id) / hashes for of_id in rows]
    torch.testing.assert_close(collection.dense_weight("t"), torch.stack(expected))
    assert Bloom(num_rows=11).num_hashes == 4


def test_ce_concatenates_a_hashed_row_a_column() -> None:
    collection = build(CE(num_rows=5, num_columns=4, seed=1))
    books = weights(collection)
    assert [book.shape for book in books] == [(5, 2)] * 4
    expected = [torch.cat([book[python_hash(v, 5, i, 1, "t", "ce")] for i, book in enumerate(books)]) for v in range(V)]
    assert torch.equal(collection.dense_weight("t"), torch.stack(expected))


def test_cce_adds_an_assigned_and_a_hashed_row_in_each_column() -> None:
    collection = build(CCE(num_rows=6, num_columns=2, num_helper_rows=3, seed=9))
    books = weights(collection)
    assert [book.shape for book in books] == [(6 + 3, 4)] * 2
    assignments = collection.state_dict()["_row_maps.t.assignments"]
    assert assignments.shape == (V, 2)
    key = (9, "t", "cce")
    hashes = build(CCE(num_rows=6, num_columns=2, num_helper_rows=3, seed=9, initial_assignments="hash"))
    hashed = [[python_hash(v, 6, i, *key, "main") for i in range(2)] for v in range(V)]
    assert hashes.state_dict()["_row_maps.t.assignments"].tolist() == hashed
    assignments.random_(0, 6)
    expected = [
        torch.cat(
            [
                book[int(assignments[v, i])] + book[6 + python_hash(v, 3, i, *key, "helper", 0)]
                for i, book in enumerate(books)
            ]
        )
        for v in range(V)
    ]
    torch.testing.assert_close(collection.dense_weight("t"), torch.stack(expected))


@pytest.mark.parametrize("remainders", [1, 6, 7, 41, 50])
def test_additive_qr_adds_remainder_and_quotient_rows(remainders: int) -> None:
    collection = build(QR(num_remainders=remainders))
    (codebook,) = weights(collection)
    assert len(codebook) == remainders + math.ceil(V / remainders)
    expected = [codebook[v % remainders] + codebook[remainders + v // remainders] for v in range(V)]
    torch.testing.assert_close(collection.dense_weight("t"), torch.stack(expected))


@pytest.mark.parametrize("remainders", [1, 6, 7, 41, 50])
def test_concatenated_qr_puts_them_side_by_side(remainders: int) -> None:
    collection = build(QR(num_remainders=remainders, operation="concat"))
    remainder, quotient = weights(collection)
    assert (remainder.shape, quotient.shape) == ((remainders, D // 2), (math.ceil(V / remainders), D // 2))
    expected = [torch.cat([remainder[v % remainders], quotient[v // remainders]]) for v in range(V)]
    assert torch.equal(collection.dense_weight("t"), torch.stack(expected))


@pytest.mark.parametrize("num_rows", [1, 7, 12, V, V + 5])
def test_blocks_of_ids_share_a_row(num_rows: int) -> None:
    collection = build(Hashing(num_rows=num_rows, assignments="blocks"))
    (weight,) = weights(collection)
    assert torch.equal(collection.dense_weight("t"), weight[[python_block(v, V, num_rows) for v in range(V)]])
    with pytest.raises(ValueError, match="'t' cannot grow"):
        collection.grow("t", V + 1)


@pytest.mark.parametrize("num_rows", [1, 7, V, V + 5])
def test_blocks_of_each_column_are_others(num_rows: int) -> None:
    collection = build(CE(num_rows=num_rows, num_columns=4, assignments="blocks"))
    columns = [
        weight[[python_block(v, V, num_rows, Fraction(i, 4)) for v in range(V)]]
        for i, weight in enumerate(weights(collection))
    ]
    assert torch.equal(collection.dense_weight("t"), torch.cat(columns, dim=1))


def test_blocks_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="4294967296 ids in 2147483647 blocks are too many for 64-bit integers"):
        Hashing(num_rows=2**31 - 1, assignments="blocks").row_map("t", 2**32, D, None)
    row_map = Hashing(num_rows=2**31 - 1, assignments="blocks").row_map("t", 2**31, D, None)
    last = 2**31 - 1
    assert row_map.rows(torch.tensor([last])).item() == python_block(last, 2**31, 2**31 - 1)


def test_what_blocks_are_not_for() -> None:
    with pytest.raises(ValueError, match="sign=True is for ids that a hash brings together"):
        Hashing(num_rows=4, sign=True, assignments="blocks")
    for method in (Hashing, CE):
        with pytest.raises(ValueError, match="assignments='modulo' is not one of blocks, hash"):
            method(num_rows=4, assignments="modulo")


def test_layouts_of_hashes_are_those_from_before_there_were_blocks() -> None:
    assert Hashing(num_rows=4).layout(V, D) == f"hashing_trick(num_rows=4) {V}x{D} format 1"
    assert CE(num_rows=4, num_columns=2).layout(V, D) == f"ce(num_rows=4, num_columns=2) {V}x{D} format 1"
    assert "assignments=blocks" in CE(num_rows=4, num_columns=2, assignments="blocks").layout(V, D)


@pytest.mark.parametrize("operation", ["add", "concat"])
def test_no_two_ids_share_a_qr_pair(operation: str) -> None:
    rows_CNR = QR(num_remainders=6, operation=operation).row_map("t", V, D, None).rows(torch.arange(V))
    assert len(torch.unique(rows_CNR.transpose(0, 1).reshape(V, 2), dim=0)) == V


@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32_768, torch.int16),
        (32_769, torch.int32),
    ],
)
def test_assignments_are_as_narrow_as_the_rows_allow(num_rows: int, dtype: torch.dtype) -> None:
    collection = build(CCE(num_rows=num_rows, num_columns=2, num_helper_rows=1))
    name, parameter_names = "_row_maps.t.assignments", dict(collection.named_parameters())
    assignments = collection.state_dict()[name]
    assert assignments.dtype == dtype
    assert name not in parameter_names
    # The last row survives being stored.
    assignments.fill_(num_rows - 1)
    with torch.no_grad():
        for book in collection.parameters():
            book.zero_()[num_rows - 1] = 5.0
    assert torch.equal(collection.dense_weight("t"), torch.full((V, D), 5.0))


def test_default_columns_are_as_many_as_the_kernels_take() -> None:
    # FBGEMM wants widths that are multiples of 4.
    for dim, columns in ((64, 8), (32, 8), (16, 4), (12, 3), (8, 2), (4, 1), (6, 1), (40, 5)):
        assert CCE.from_budget(1000, dim, 100 * dim).num_columns == columns
    assert CE.from_budget(1000, 64, 6400).num_columns == 8


def test_dense_weight_of_more_ids_than_are_decoded_at_once() -> None:
    size = 2**18
    assert [len(ids) for ids in id_chunks(2 * size + 5)] == [size, size, 5]
    collection = build(CCE(num_rows=4, num_columns=2), num_embeddings=size + 3)
    dense, books = collection.dense_weight("t"), weights(collection)
    assignments = collection.state_dict()["_row_maps.t.assignments"]
    for v in (0, size - 1, size, size + 2):
        helper = [python_hash(v, 4, i, 0, "t", "cce", "helper", 0) for i in range(2)]
        expected = torch.cat([book[int(assignments[v, i])] + book[4 + helper[i]] for i, book in enumerate(books)])
        torch.testing.assert_close(dense[v], expected)


def test_configs_are_frozen_and_by_keyword() -> None:
    with pytest.raises(TypeError):
        CCE(10)
    with pytest.raises(AttributeError):
        CCE(num_rows=10).num_rows = 11
    assert CCE(num_rows=10).num_params(1000, 16) == 320
    assert len({CE(num_rows=3), CE(num_rows=3), CE(num_rows=4)}) == 2
