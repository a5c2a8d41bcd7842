"""Swapping compressed collections into models that are not plain trees, or not at all."""

import re

import pytest
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec import CCE, CE, CompressedEmbeddingBagCollection, CompressionRule, compress
from tests.unit.test_compress import DIM, Model, stock


def test_a_collection_that_stands_twice_is_swapped_twice() -> None:
    model = nn.ModuleDict({"query": (shared := stock()), "candidate": shared})
    compress(model, {"item": CCE(num_rows=5, num_columns=2)})
    assert isinstance(model["query"], CompressedEmbeddingBagCollection)
    assert model["candidate"] is model["query"]


def test_tables_of_one_name_in_two_collections_follow_the_rules_each_by_its_own_size() -> None:
    small = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=DIM, feature_names=["f"])
    large = EmbeddingBagConfig(name="t", num_embeddings=10_000, embedding_dim=DIM, feature_names=["f"])
    rules = [CompressionRule(method="cce", min_num_embeddings=1000, compression=10)]
    for tables in ([small, large], [large, small]):
        model = nn.Sequential(*(EmbeddingBagCollection(tables=[table]) for table in tables))
        compress(model, rules)
        for table, collection in zip(tables, model, strict=True):
            assert isinstance(collection, CompressedEmbeddingBagCollection) == (table is large)


def test_a_method_that_does_not_fit_changes_nothing() -> None:
    model = Model()
    with pytest.raises(ValueError, match="Table 'b_item': embedding_dim=8 cannot be cut in num_columns=3"):
        compress(model, {"item": CE(num_rows=3, num_columns=2), "b_item": CE(num_rows=3, num_columns=3)})
    assert not any(isinstance(module, CompressedEmbeddingBagCollection) for module in model.modules())


def test_a_rule_that_fixes_no_size_says_which_table_and_what_is_missing() -> None:
    with pytest.raises(ValueError, match=re.compile("Table 'user'.*(compression|num_params)")):
        compress(stock(), [CompressionRule(method="cce")])


def test_what_is_already_compressed_is_not_opened_up() -> None:
    everything = [CompressionRule(method="ce", num_params=80)]
    model = nn.Sequential(compress(stock(), {"item": CCE(num_rows=5, num_columns=2)}), stock("b_"))
    compress(model, everything)
    inside = model[0]._embedding_bag_collection
    assert type(inside) is EmbeddingBagCollection
    assert [config.name for config in inside.embedding_bag_configs()] == ["user", "item:0", "item:1", "genre"]
    assert isinstance(model[1], CompressedEmbeddingBagCollection)
