"""Swapping compressed collections into models that are not plain trees, or not at all."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCE, CE, CompressedEmbeddingBagCollection, CompressionRule, HashingTrick, compress
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


def table(name: str, num_embeddings: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=num_embeddings, embedding_dim=DIM, feature_names=[f"f_{name}"])


def ebc(*tables: EmbeddingBagConfig) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(tables=list(tables))


def test_an_optimizer_applied_in_backward_goes_on() -> None:
    """One step of SGD moves what was compressed and what stayed full by lr times the gradient."""
    model = nn.Sequential(ebc(table("item", 100), table("small", 10)))
    apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1.0})
    collection = compress(model, {"item": HashingTrick(num_rows=7)})[0]
    before = {name: collection.dense_weight(name) for name in ("item", "small")}
    features = [config.feature_names[0] for config in collection.embedding_bag_configs()]
    kjt = KeyedJaggedTensor.from_lengths_sync(features, torch.tensor([3, 4]), torch.tensor([1, 1]))
    collection(kjt).values().sum().backward()
    for name, row in (("item", 3), ("small", 4)):
        torch.testing.assert_close(before[name][row] - collection.dense_weight(name)[row], torch.ones(DIM))


def test_a_frozen_table_stays_frozen() -> None:
    model = ebc(table("item", 100), table("small", 10))
    model.embedding_bags["small"].weight.requires_grad_(False)
    assert not compress(model, {"item": HashingTrick(num_rows=7)}).codebook("small").requires_grad


@pytest.mark.parametrize("rules", ["cce", HashingTrick(num_rows=7), {"item": "cce"}, ["cce"], 5])
def test_rules_of_another_kind(rules: Any) -> None:
    with pytest.raises(ValueError, match="neither a list of CompressionRule"):
        compress(ebc(table("item", 100)), rules)


def test_one_rule_needs_no_list() -> None:
    rule = CompressionRule(method="hashing_trick", options={"num_rows": 7})
    assert isinstance(compress(ebc(table("item", 100)), rule), CompressedEmbeddingBagCollection)


@pytest.mark.parametrize("fields", [{"compression": float("nan")}, {"compression": "8"}, {"tables": "["}])
def test_rules_are_checked_when_they_are_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is below 1 or not a number|is not a regular expression"):
        CompressionRule(method="cce", **fields)
