"""Tables side by side: every method and plain tables in one collection, with TorchRec's own names and order."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface

from cce_torchrec import CompressedEmbeddingBagCollection
from tests.contract.cases import VARIANTS, Variant, budgets, make_table
from tests.unit.oracles import make_kjt, pool

V, D = 50, 8
BAGS = {
    "a": [[1], [2, 2], []],
    "b": [[], [49, 0, 3], [5]],
    "shared": [[7, 8], [], [9, 9]],
    "unused": [[1000], [], [-5]],
    "c": [[0], [1], [2]],
}
every_method = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def method_for(variant: Variant, dim: int = D):
    return variant.from_budget(V, dim, budgets(variant, V, dim)[-2])


def assert_pools(
    collection: CompressedEmbeddingBagCollection, key: str, table: EmbeddingBagConfig, out, weights=None
) -> None:
    feature = key.split("@")[0]
    expected = pool(collection.dense_weight(table.name), BAGS[feature], table.pooling, weights and weights[feature])
    torch.testing.assert_close(out[key], expected, msg=lambda text: f"{key} of {table}: {text}")


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Each variant once by SUM and once by MEAN, of other widths, and plain tables between; features shared and not."""
    tables: list[EmbeddingBagConfig] = []
    for index, variant in enumerate(VARIANTS):
        for pooling in (PoolingType.SUM, PoolingType.MEAN):
            dim = (4, 8, 16)[index % 3]
            name = f"t{index}_{pooling.name}"
            features = [["a", "shared"], ["shared"], ["b", "c", "shared"]][index % 3]
            tables.append(
                make_table(
                    method_for(variant, dim), name=name, embedding_dim=dim, feature_names=features, pooling=pooling
                )
            )
    plain = EmbeddingBagConfig(name="plain", num_embeddings=V, embedding_dim=D, feature_names=["c", "a"])
    tables.insert(1, plain)
    return tables


def as_plain(tables: list[EmbeddingBagConfig]) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
            pooling=table.pooling,
        )
        for table in tables
    ]


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
def test_mixed_methods_and_plain_tables(is_weighted: bool) -> None:
    tables = mixed_tables()
    collection = CompressedEmbeddingBagCollection(tables=tables, is_weighted=is_weighted)
    weights = {f: [[0.5 + i + 0.25 * n for n in range(len(bag))] for i, bag in enumerate(BAGS[f])] for f in BAGS}
    out = collection(make_kjt(BAGS, weights if is_weighted else None))
    keys = iter(out.keys())
    for table in tables:
        for _ in table.feature_names:
            assert_pools(collection, key := next(keys), table, out, weights if is_weighted else None)
            assert key.endswith("@" + table.name)  # here every feature is shared
    assert next(keys, None) is None


def test_names_order_and_widths_are_those_of_the_stock_collection() -> None:
    tables = mixed_tables()
    kjt = make_kjt({feature: [[number % V for number in bag] for bag in bags] for feature, bags in BAGS.items()})
    ours, stock = CompressedEmbeddingBagCollection(tables=tables), EmbeddingBagCollection(tables=as_plain(tables))
    mine, theirs = ours(kjt), stock(kjt)
    assert isinstance(ours, EmbeddingBagCollectionInterface)
    assert mine.keys() == theirs.keys()
    assert mine.length_per_key() == theirs.length_per_key()
    assert mine.values().shape == theirs.values().shape
    assert ours.embedding_bag_configs() == tables
    assert (ours.is_weighted(), ours.device) == (stock.is_weighted(), stock.device)


def test_plain_tables_alone_are_the_stock_collection() -> None:
    tables = [
        EmbeddingBagConfig(name="t", num_embeddings=V, embedding_dim=4, feature_names=["a", "b"]),
        EmbeddingBagConfig(name="u", num_embeddings=V, embedding_dim=8, pooling=PoolingType.MEAN, feature_names=["a"]),
        EmbeddingBagConfig(name="c", num_embeddings=V, embedding_dim=8),  # the feature is called as the table
    ]
    stock = EmbeddingBagCollection(tables=as_plain(tables))
    ours = CompressedEmbeddingBagCollection(tables=tables)
    for table in tables:
        ours.codebook(table.name).data.copy_(stock.embedding_bags[table.name].weight)
    mine, theirs = ours(make_kjt(BAGS)), stock(make_kjt(BAGS))
    assert mine.keys() == theirs.keys() == ["a@t", "b", "a@u", "c"]
    torch.testing.assert_close(mine.values(), theirs.values())


@every_method
def test_several_features_on_a_table(variant: Variant) -> None:
    table = make_table(method_for(variant), feature_names=["b", "a", "shared"])
    collection = CompressedEmbeddingBagCollection(tables=[table])
    out = collection(make_kjt(BAGS))
    assert out.keys() == ["b", "a", "shared"]
    for key in out.keys():  # noqa: SIM118
        assert_pools(collection, key, table, out)


@every_method
def test_one_feature_in_several_tables(variant: Variant) -> None:
    tables = [
        make_table(method_for(variant), name="t", feature_names=["shared", "a"]),
        make_table(method_for(variant), name="u", feature_names=["shared"], pooling=PoolingType.MEAN),
    ]
    collection = CompressedEmbeddingBagCollection(tables=tables)
    out = collection(make_kjt(BAGS))
    assert out.keys() == ["shared@t", "a", "shared@u"]
    for key, table in zip(out.keys(), [tables[0], tables[0], tables[1]], strict=True):
        assert_pools(collection, key, table, out)


@every_method
def test_batches_in_any_key_order_with_extra_features(variant: Variant) -> None:
    tables = [
        make_table(method_for(variant), name="t", feature_names=["a", "b"], pooling=PoolingType.MEAN),
        make_table(method_for(variant), name="u", feature_names=["c"]),
    ]
    collection = CompressedEmbeddingBagCollection(tables=tables, is_weighted=True)
    weights = {f: [[1.5 - n for n in range(len(bag))] for bag in bags] for f, bags in BAGS.items()}
    for order in (["a", "b", "c"], ["c", "b", "a"], ["unused", "b", "shared", "c", "a"]):
        out = collection(make_kjt({feature: BAGS[feature] for feature in order}, weights))
        assert out.keys() == ["a", "b", "c"]
        for key, table in zip(out.keys(), [tables[0], tables[0], tables[1]], strict=True):
            assert_pools(collection, key, table, out, weights)


@every_method
def test_feature_and_table_names_may_hold_anything_but_columns(variant: Variant) -> None:
    table = make_table(method_for(variant), name="a table/1", feature_names=["a#x", "b y"])
    collection = CompressedEmbeddingBagCollection(tables=[table])
    out = collection(make_kjt({"a#x": [[3]], "b y": [[3]]}))
    torch.testing.assert_close(out["a#x"], out["b y"])
