"""Swapping compressed collections into models that exist."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec import (
    CCE,
    CE,
    METHODS,
    QR,
    CompressedEmbeddingBagCollection,
    CompressionRule,
    FullTable,
    HashingTrick,
    compress,
    recluster,
)
from tests.unit.oracles import make_kjt

SIZES = {"user": 1000, "item": 5000, "genre": 18}
DIM = 8
BATCH = {"user": [[3], [999]], "item": [[0, 4999], []], "genre": [[17], [5]]}


def configs(prefix: str = "", **fields: Any) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=prefix + name, num_embeddings=size, embedding_dim=DIM, feature_names=[prefix + name], **fields
        )
        for name, size in SIZES.items()
    ]


def stock(prefix: str = "", is_weighted: bool = False, device: torch.device | None = None, **fields: Any):
    return EmbeddingBagCollection(tables=configs(prefix, **fields), is_weighted=is_weighted, device=device)


def methods_of(collection: nn.Module) -> dict[str, str]:
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    return {config.name: config.method.key for config in collection.embedding_bag_configs()}


class Model(nn.Module):
    """Collections at the top, nested, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.top = stock()
        self.inner = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), stock("deep_"))})
        self.towers = nn.ModuleList([stock("a_"), stock("b_")])
        self.other = nn.Linear(2, 2)


def test_by_name() -> None:
    model = compress(stock(), {"item": CCE(num_rows=20, num_columns=2), "user": HashingTrick(num_rows=7)})
    assert methods_of(model) == {"user": "hashing_trick", "item": "cce", "genre": "full"}
    assert model.codebook("item:0").shape == (40, 4)
    assert model(make_kjt(BATCH)).keys() == ["user", "item", "genre"]


def test_by_rule_the_first_that_matches() -> None:
    rules = [
        CompressionRule(method="qr", tables="item|nothing", compression=2),
        CompressionRule(method="ce", min_num_embeddings=1000, compression=10),
        CompressionRule(method="hashing_trick", compression=2),
    ]
    model = compress(stock(), rules)
    assert methods_of(model) == {"user": "ce", "item": "qr", "genre": "hashing_trick"}
    report = {row.table: row for row in model.memory_report().tables}
    assert 2 <= report["item"].parameter_ratio < 2.1
    assert report["user"].parameter_ratio == 10
    assert report["genre"].parameter_ratio == 2


@pytest.mark.parametrize(("threshold", "compressed"), [(1000, {"user", "item"}), (1001, {"item"}), (18, set(SIZES))])
def test_rule_by_size_counts_from_the_threshold_on(threshold: int, compressed: set[str]) -> None:
    methods = methods_of(
        compress(stock(), [CompressionRule(method="cce", min_num_embeddings=threshold, num_params=64)])
    )
    assert {name for name, method in methods.items() if method == "cce"} == compressed


def test_a_pattern_is_for_the_whole_name() -> None:
    rule = CompressionRule(method="ce", tables="it.m", num_params=80)
    assert rule.matches("item", 1)
    assert not rule.matches("items", 1)
    assert not rule.matches("an_item", 1)


def test_rule_with_options_alone() -> None:
    rule = CompressionRule(method="cce", tables="item", options={"num_rows": 5, "num_columns": 4, "seed": 2})
    model = compress(stock(), [rule])
    assert model.embedding_bag_configs()[1].method == CCE(num_rows=5, num_columns=4, seed=2)


def test_rule_with_a_budget_and_options() -> None:
    rule = CompressionRule(method="qr", compression=4, options={"operation": "concat"})
    method = rule.method_for(1000, DIM)
    assert method.operation == "concat"
    assert method.num_params(1000, DIM) <= 2000


def test_by_a_plan() -> None:
    methods = {"item": CE(num_rows=9, num_columns=2)}
    plan = SimpleNamespace(methods=methods, method_for=lambda table: methods.get(table.name))
    assert methods_of(compress(stock(), plan)) == {"user": "full", "item": "ce", "genre": "full"}


@pytest.mark.parametrize("key", METHODS)
def test_every_method_by_rule(key: str) -> None:
    model = compress(stock(), [CompressionRule(method=key, num_params=SIZES["item"] * DIM + 100)])
    assert set(methods_of(model).values()) == {key}
    assert model(make_kjt(BATCH)).values().isfinite().all()


def test_nested_models_change_in_place() -> None:
    model = Model()
    towers = list(model.towers)
    rules = [CompressionRule(method="cce", tables="item|deep_item|b_item", num_params=400)]
    assert compress(model, rules) is model
    assert isinstance(model.top, CompressedEmbeddingBagCollection)
    assert methods_of(model.inner["deep"][1]) == {"deep_user": "full", "deep_item": "cce", "deep_genre": "full"}
    assert model.towers[0] is towers[0]  # nothing of it matches
    assert isinstance(model.towers[1], CompressedEmbeddingBagCollection)
    assert len(recluster(model, seed=0).tables) == 3


def test_trained_weights_of_full_tables_are_kept() -> None:
    collection = stock(pooling=PoolingType.MEAN)
    before = {name: bag.weight.detach().clone() for name, bag in collection.embedding_bags.items()}
    expected = collection(make_kjt(BATCH))
    model = compress(collection, {"item": CCE(num_rows=20, num_columns=2)})
    for name in ("user", "genre"):
        assert torch.equal(model.dense_weight(name), before[name])
        torch.testing.assert_close(model(make_kjt(BATCH))[name], expected[name])
    # They are copies: training the new model leaves the old one alone.
    model.codebook("user").data.zero_()
    assert torch.equal(collection.embedding_bags["user"].weight, before["user"])


def test_what_describes_the_tables_is_kept() -> None:
    init_fn = torch.nn.init.ones_
    collection = stock(pooling=PoolingType.MEAN, data_type=DataType.FP16, init_fn=init_fn, is_weighted=True).eval()
    model = compress(collection, {"item": CE(num_rows=3, num_columns=2)})
    assert model.is_weighted()
    assert not model.training
    for old, new in zip(collection.embedding_bag_configs(), model.embedding_bag_configs(), strict=True):
        for field in ("name", "num_embeddings", "embedding_dim", "feature_names", "pooling", "data_type", "init_fn"):
            assert getattr(new, field) == getattr(old, field)
    assert torch.equal(model.dense_weight("item"), torch.ones(5000, DIM))
    assert model.codebook("item:0").dtype == torch.float16


def test_on_the_meta_device() -> None:
    model = compress(stock(device=torch.device("meta")), {"item": CCE(num_rows=20, num_columns=2)})
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_swaps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cce_torchrec"):
        compress(Model(), {"deep_item": CE(num_rows=3, num_columns=2)})
    (record,) = caplog.records
    assert "inner.deep.1" in record.getMessage()
    assert "deep_item" in record.getMessage()


def test_dlrm_trains_on_a_compressed_collection() -> None:
    torch.manual_seed(0)
    dlrm = DLRM(
        embedding_bag_collection=stock(),
        dense_in_features=3,
        dense_arch_layer_sizes=[8, DIM],
        over_arch_layer_sizes=[8, 1],
    )
    model = DLRMTrain(compress(dlrm, {"item": CCE(num_rows=20, num_columns=2), "user": QR(num_remainders=30)}))
    collection = next(m for m in model.modules() if isinstance(m, CompressedEmbeddingBagCollection))
    assert not any(type(module) is EmbeddingBagCollection for module in collection.named_children())
    batch = Batch(dense_features=torch.randn(2, 3), sparse_features=make_kjt(BATCH), labels=torch.tensor([0, 1]))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    before = {name: collection.dense_weight(name) for name in SIZES}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, number in (("user", 999), ("item", 4999), ("genre", 17)):
        assert not torch.equal(collection.dense_weight(name)[number], before[name][number])
    recluster(model, seed=0, optimizer=optimizer)
    model(batch)[0].backward()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_name_that_no_table_has() -> None:
    with pytest.raises(ValueError, match=r"no table \['itme'\]; the model's tables are \['user', 'item', 'genre'\]"):
        compress(stock(), {"itme": CE(num_rows=3), "item": CE(num_rows=3)})


@pytest.mark.parametrize("rules", [[], {}, [CompressionRule(method="cce", min_num_embeddings=10**6, compression=2)]])
def test_rules_that_match_nothing(rules: Any) -> None:
    with pytest.raises(ValueError, match=r"No table is compressed .* 1 collections have \['user', 'item', 'genre'\]"):
        compress(stock(), rules)


def test_a_model_without_collections() -> None:
    with pytest.raises(ValueError, match=r"No table is compressed .* 0 collections have \[\]"):
        compress(nn.Linear(2, 2), [CompressionRule(method="cce", compression=2)])


def test_a_budget_that_cannot_be_met_names_the_table_and_changes_nothing() -> None:
    model = Model()
    rules = [
        CompressionRule(method="cce", tables="item", compression=2),
        CompressionRule(method="qr", compression=5000),
    ]
    with pytest.raises(ValueError, match=r"Table 'user': qr: a budget of 1 parameters is too small.* is 512\."):
        compress(model, rules)  # the smallest QR of 1000 ids: (32 + 32) rows of 8
    assert not any(isinstance(module, CompressedEmbeddingBagCollection) for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": 2, "num_params": 100}, "compression=2 and num_params=100 are two budgets: give one"),
        ({"compression": 0.5}, "compression=0.5 is below 1"),
        (
            {"options": {"rows": 3}},
            r"options \['rows'\] are not fields of 'cce'; those are \['num_rows', .*'initial_assignments'\]",
        ),
    ],
)
def test_bad_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionRule(method="cce", **fields)


def test_full_tables_by_rule_need_no_size() -> None:
    rules = [CompressionRule(method="full", tables="user"), CompressionRule(method="ce", compression=4)]
    assert methods_of(compress(stock(), rules)) == {"user": "full", "item": "ce", "genre": "ce"}
    assert isinstance(CompressionRule(method="full").method_for(3, 4), FullTable)
