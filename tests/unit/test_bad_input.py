"""Mistakes of users: each gets an error that names the value and the remedy."""

import logging
import math
import re
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import (
    CCE,
    CE,
    QR,
    Bloom,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressionRule,
    FullTable,
    HashingTrick,
    ReclusterConfig,
    ReclusterSchedule,
    ResidualCCE,
    recluster,
)
from cce_torchrec.methods import DHE, PQ, ROBE, CCERobe, HashedNet, HashEmbedding, LowDim, MethodConfig, TTRec
from tests.unit.oracles import make_kjt

V, D = 20, 8
BOUNDED = [
    FullTable(),
    QR(num_remainders=4),
    QR(num_remainders=4, operation="concat"),
    CCE(num_rows=4, num_columns=2),
    HashingTrick(num_rows=4, assignments="blocks"),
    CE(num_rows=4, num_columns=2, assignments="blocks"),
]
HASHED = [HashingTrick(num_rows=4), Bloom(num_rows=4, num_hashes=1), CE(num_rows=4, num_columns=2)]


def table(method: Any = None, name: str = "t", **fields: Any) -> CompressedEmbeddingBagConfig:
    defaults = {"num_embeddings": V, "embedding_dim": D, "feature_names": ["f"]}
    return CompressedEmbeddingBagConfig(name=name, method=method or FullTable(), **(defaults | fields))


def build(*tables: EmbeddingBagConfig, **options: Any) -> CompressedEmbeddingBagCollection:
    return CompressedEmbeddingBagCollection(tables=list(tables), **options)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_unknown_method_by_name() -> None:
    with pytest.raises(ValueError, match=r"method='cccp' is unknown; the methods are full, .*cce"):
        CompressionRule(method="cccp", compression=2)


@pytest.mark.parametrize("method", ["cce", CCE, 7, {"num_rows": 3}], ids=str)
def test_something_that_is_not_a_method(method: Any) -> None:
    pattern = f"Table 't' has method={re.escape(repr(method))}, which is not a method config; .*METHODS"
    with pytest.raises(ValueError, match=pattern):
        build(table(method))


def test_duplicate_table_names() -> None:
    with pytest.raises(ValueError, match=r"Duplicate table name 'item' \(2 tables\): give each .* its own"):
        build(table(name="item"), table(CCE(num_rows=2), name="user"), table(CE(num_rows=2), name="item"))


@pytest.mark.parametrize("method", [CCE(num_rows=4, num_columns=3), CE(num_rows=4, num_columns=3)], ids=lambda m: m.key)
def test_columns_that_do_not_divide_the_dim(method: MethodConfig) -> None:
    message = r"embedding_dim=8 cannot be cut in num_columns=3 .* work are 2 and 4"
    with pytest.raises(ValueError, match=rf"Table 't': {message}"):
        build(table(method))
    with pytest.raises(ValueError, match=message):
        method.num_params(V, D)
    with pytest.raises(ValueError, match=message):
        type(method).from_budget(V, D, 1000, num_columns=3)


def test_more_columns_than_dims() -> None:
    with pytest.raises(ValueError, match=r"embedding_dim=8 cannot be cut in num_columns=16 .* 8"):
        build(table(CCE(num_rows=4, num_columns=16)))


def test_odd_dim_of_concatenated_qr() -> None:
    with pytest.raises(ValueError, match="Table 't': embedding_dim=7 cannot be cut in num_columns=2"):
        build(table(QR(num_remainders=4, operation="concat"), embedding_dim=7))


@pytest.mark.parametrize("fields", [{"num_embeddings": 0}, {"embedding_dim": -1}], ids=str)
def test_tables_of_no_size(fields: dict[str, int]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"Table 't' has .*{name}={value}.* at least 1"):
        # A method with a fixed size, and an explicit range, so that nothing earlier divides by the number of ids.
        build(table(HashingTrick(num_rows=3), weight_init_min=0.0, weight_init_max=1.0, **fields))


@pytest.mark.parametrize("value", [0, -5, 2.0, "8", None])
@pytest.mark.parametrize(
    ("method", "name"),
    [(CCE, "num_rows"), (CE, "num_rows"), (HashingTrick, "num_rows"), (Bloom, "num_rows"), (QR, "num_remainders")],
)
def test_sizes_that_are_not_positive_integers(method: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not a positive integer"):
        method(**{name: value})


@pytest.mark.parametrize("fields", [{"num_columns": 0}, {"num_helper_rows": 0}], ids=str)
def test_other_sizes_of_cce(fields: dict[str, int]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"{name}={value} is not"):
        CCE(num_rows=5, **fields)


@pytest.mark.parametrize("levels", [1, 0, -2, 2.0])
def test_levels_of_residual_cce(levels: Any) -> None:
    message = rf"num_levels={levels} (leaves no codebook .* 2 levels or more|is not a positive integer)"
    with pytest.raises(ValueError, match=message):
        ResidualCCE(num_rows=5, num_levels=levels)
    with pytest.raises(ValueError, match=message):
        ResidualCCE.from_budget(V, D, 1000, num_levels=levels)


def test_bloom_without_hashes() -> None:
    with pytest.raises(ValueError, match="num_hashes=0 is not a positive integer"):
        Bloom(num_rows=5, num_hashes=0)
    with pytest.raises(ValueError, match="num_hashes=0 is not a positive integer"):
        Bloom.from_budget(V, D, 100, num_hashes=0)


def test_unknown_operation_of_qr() -> None:
    with pytest.raises(ValueError, match="operation='multiply' is not one of add, concat"):
        QR(num_remainders=5, operation="multiply")  # type: ignore[arg-type]


def test_budget_too_small_names_the_smallest_one() -> None:
    with pytest.raises(ValueError, match=r"cce: a budget of 15 parameters is too small .* smallest possible is 16"):
        CCE.from_budget(V, D, 15)
    assert CCE.from_budget(V, D, 16).num_params(V, D) == 16
    with pytest.raises(ValueError, match=r"residual_cce: a budget of 31 parameters .* smallest possible is 32"):
        ResidualCCE.from_budget(V, D, 31, num_levels=4)


CANNOT_BE = [
    (TTRec(rank=2, cores=4), 12, r"embedding_dim=12 is a product of 3 primes, too few for cores=4: cores=3 .*=16"),
    (
        ROBE(num_cells=100, block_size=17),
        16,
        r"block_size=17 is above embedding_dim=16.* nearest size that works is 16",
    ),
    (CCERobe(num_cells=3, num_columns=4), 16, r"num_cells=3 is smaller than a window of 4 .* that works is 4"),
    (CCERobe(num_cells=9, num_columns=3), 16, r"embedding_dim=16 cannot be cut in num_columns=3 .* work are 2 and 4"),
    (LowDim(dim=20), 16, r"dim=20 is above embedding_dim=16.* nearest that works is 16"),
    (HashEmbedding(num_rows=3, num_weights=3, num_hashes=16, concat_weights=True), 16, "num_hashes=16 leaves .*=15 "),
    (PQ(num_rows=3, num_columns=5), 16, r"embedding_dim=16 cannot be cut in num_columns=5 .* work are 4 and 8"),
    (ResidualCCE(num_rows=3, num_columns=32), 16, r"embedding_dim=16 cannot be cut in num_columns=32 .* 16"),
]


@pytest.mark.parametrize(("method", "dim", "message"), CANNOT_BE, ids=lambda value: getattr(value, "key", ""))
def test_sizes_that_do_not_fit_the_table(method: MethodConfig, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.num_params(V, dim)
    with pytest.raises(ValueError, match=f"Table 't': .*{message}"):
        build(table(method, embedding_dim=dim))


@pytest.mark.parametrize("value", [0, -1, 2.5, "x"])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *[
            (TTRec, "rank"),
            (TTRec, "cores"),
            (ROBE, "block_size"),
            (ROBE, "num_cells"),
            (LowDim, "dim"),
            (LowDim, "num_rows"),
        ],
        *[
            (DHE, "width"),
            (DHE, "depth"),
            (DHE, "num_hashes"),
            (HashEmbedding, "num_weights"),
            (HashedNet, "num_cells"),
        ],
        *[(CCERobe, "num_helper_cells"), (CCERobe, "num_columns"), (PQ, "num_columns"), (ResidualCCE, "num_levels")],
    ],
)
def test_budgets_with_a_size_that_cannot_be(method: type[MethodConfig], name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}={re.escape(repr(value))} is not (a positive integer|one of .* works)"
    ):
        method.from_budget(V, 16, 10_000, **{name: value})


@pytest.mark.parametrize("value", [1, "yes", None], ids=str)
def test_choices_that_are_none(value: Any) -> None:
    for name, make in {
        "signed": lambda **fields: HashedNet(num_cells=9, **fields),
        "concat_weights": lambda **fields: HashEmbedding(num_rows=9, num_weights=9, **fields),
        "sign": lambda **fields: HashingTrick(num_rows=9, **fields),
    }.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} is neither True nor False"):
            make(**{name: value})
    with pytest.raises(ValueError, match=f"signed={value!r} is neither True nor False"):
        ROBE(num_cells=9, block_size=2, signed=value)


def test_names_that_collide_once_cut_in_columns() -> None:
    with pytest.raises(ValueError, match="Two tables would be stored as 't:0': rename"):
        build(table(CCE(num_rows=2, num_columns=2)), table(name="t:0", feature_names=["g"]))
    with pytest.raises(ValueError, match="Two features would be stored as 'f:0': rename"):
        build(table(CCE(num_rows=2, num_columns=2)), table(name="u", feature_names=["f:0"]))


def test_no_such_table_to_decode() -> None:
    with pytest.raises(ValueError, match=r"No table 'tt'; the tables are \['t'\]"):
        build(table()).dense_weight("tt")


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*BOUNDED, *HASHED], ids=str)
def test_a_feature_in_no_batch(method: MethodConfig) -> None:
    with pytest.raises(ValueError, match=r"has no feature \['f'\]; it has \['g'\]"):
        build(table(method))(make_kjt({"g": [[1]]}))


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
def test_missing_weights(pooling: PoolingType) -> None:
    collection = build(table(CCE(num_rows=4, num_columns=2), pooling=pooling), is_weighted=True)
    with pytest.raises(ValueError, match=r"is weighted \(is_weighted=True\) but the KeyedJaggedTensor has no weights"):
        collection(make_kjt({"f": [[1]]}))


@pytest.mark.parametrize("method", [FullTable(), CCE(num_rows=4, num_columns=2)], ids=lambda m: m.key)
def test_batch_sizes_by_feature(method: MethodConfig) -> None:
    features = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
    )
    with pytest.raises(ValueError, match=r"batch size per feature .*`stride`"):
        build(table(method), table(method, name="u", feature_names=["g"]))(features)


# --- ids out of range ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**63)])
@pytest.mark.parametrize("method", BOUNDED, ids=str)
def test_fatal_names_table_id_range_and_remedy(method: MethodConfig, bad: int) -> None:
    message = rf"Table 't': id {bad} is outside \[0, {V}\) \(1 of 3 ids are\).*num_embeddings.*BoundsCheckMode.WARNING"
    with pytest.raises(IndexError, match=message):
        build(table(method))(make_kjt({"f": [[3, bad], [V - 1]]}))


@pytest.mark.parametrize("method", BOUNDED, ids=str)
def test_warning_counts_logs_and_looks_up_id_zero(method: MethodConfig, caplog: pytest.LogCaptureFixture) -> None:
    collection = build(table(method), bounds_check_mode=BoundsCheckMode.WARNING)
    dense = collection.dense_weight("t")
    with caplog.at_level(logging.WARNING, "cce_torchrec"):
        out = collection(make_kjt({"f": [[3, V], [-7], [5]]}))["f"]
        collection(make_kjt({"f": [[0, V - 1]]}))
        collection(make_kjt({"f": [[2**50]]}))
    expected = torch.stack([dense[3] + dense[0], dense[0], dense[5]])
    torch.testing.assert_close(out.detach(), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    first, last = (record.getMessage() for record in caplog.records)
    assert re.search(rf"Table 't': id {V} is outside \[0, {V}\) and is looked up as id 0; 2 such ids", first)
    assert "3 such ids so far" in last


@pytest.mark.parametrize("method", BOUNDED, ids=str)
def test_ignore_looks_up_id_zero_silently(method: MethodConfig, caplog: pytest.LogCaptureFixture) -> None:
    collection = build(table(method), bounds_check_mode=BoundsCheckMode.IGNORE)
    out = collection(make_kjt({"f": [[V], [-1]]}))["f"]
    torch.testing.assert_close(out.detach(), collection.dense_weight("t")[[0, 0]])
    assert not caplog.records


@pytest.mark.parametrize("mode", [BoundsCheckMode.FATAL, BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
@pytest.mark.parametrize("method", HASHED, ids=str)
def test_hashed_methods_tell_any_ids_apart(
    method: MethodConfig, mode: BoundsCheckMode, caplog: pytest.LogCaptureFixture
) -> None:
    collection = build(table(method), bounds_check_mode=mode)
    out = collection(make_kjt({"f": [[number] for number in range(-50, 50)]}))["f"]
    assert len(torch.unique(out.detach(), dim=0)) == (16 if isinstance(method, CE) else 4)
    assert not caplog.records


def test_each_table_has_its_own_range() -> None:
    small = table(CCE(num_rows=4, num_columns=2), num_embeddings=3)
    large = table(CCE(num_rows=4, num_columns=2), name="large", num_embeddings=100, feature_names=["g"])
    collection = build(small, large)
    collection(make_kjt({"f": [[2]], "g": [[99]]}))
    with pytest.raises(IndexError, match="Table 't': id 3 "):
        collection(make_kjt({"f": [[3]], "g": [[99]]}))
    with pytest.raises(IndexError, match="Table 'large': id 100 "):
        collection(make_kjt({"f": [[2]], "g": [[100]]}))


# --- re-clustering ---------------------------------------------------------------------------------------------------


def cce(**fields: Any) -> CompressedEmbeddingBagCollection:
    return build(table(CCE(num_rows=4, num_columns=2), **fields))


def test_reclustering_nothing() -> None:
    message = r"no table to re-cluster \({} compressed collections\): only the methods \['cce'"
    with pytest.raises(ValueError, match="Linear has " + message.format(0)):
        recluster(torch.nn.Linear(2, 2), seed=0)
    with pytest.raises(ValueError, match=message.format(1)):
        recluster(build(table(CE(num_rows=4, num_columns=2)), table(name="u", feature_names=["g"])), seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    collection = cce()
    collection.codebook("t:1").data[2, 3] = value
    with pytest.raises(ValueError, match=r"Table 't': 1 of 32 weights of column 1 are NaN or infinite.*checkpoint"):
        recluster(collection, seed=0)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("t", torch.ones(V + 1), rf"id_weights\['t'\] must be \[{V}\] .*\({V + 1},\)"),
        ("t", torch.ones(V, 1), rf"must be \[{V}\]"),
        ("t", torch.empty(0), "nothing"),
        ("t", torch.zeros(V), "not all 0"),
        ("t", -torch.ones(V), "minimum of -1.0"),
        ("t", torch.full((V,), math.nan), "nan"),
        ("u", torch.ones(V), r"id_weights has 'u', .* those are \['t'\]"),
    ],
)
def test_weights_of_ids_that_do_not_fit(name: str, weights: torch.Tensor, message: str) -> None:
    collection = cce()
    before = {key: value.clone() for key, value in collection.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        recluster(collection, seed=0, id_weights={name: weights})
    for key, value in collection.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_iterations": 0}, "num_iterations=0 is not a positive integer"),
        ({"points_per_centroid": -1}, "points_per_centroid=-1 "),
        ({"decode_batch_size": 0}, "decode_batch_size=0 "),
        ({"tolerance": 1.0}, r"tolerance=1.0 is not in \[0, 1\)"),
        ({"tolerance": -0.1}, "tolerance=-0.1 "),
        ({"tolerance": math.nan}, "tolerance=nan "),
        ({"optimizer_state": "keep"}, r"optimizer_state='keep' is not one of \('reset', 'carry'\)"),
    ],
)
def test_recluster_config(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReclusterConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 0}, "total_steps=0 is not a positive integer"),
        ({"count": 0}, "count=0 "),
        ({"every_steps": 0}, "every_steps=0 "),
        ({"stop_after_fraction": 0.0}, r"stop_after_fraction=0.0 is not in \(0, 1\]"),
        ({"stop_after_fraction": 1.1}, "stop_after_fraction=1.1 "),
        ({"stop_after_fraction": math.nan}, "stop_after_fraction=nan "),
    ],
)
def test_recluster_schedule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReclusterSchedule(**({"total_steps": 100} | fields))


def test_more_rows_than_ids_is_simply_right() -> None:
    collection = build(table(CCE(num_rows=50, num_columns=2), num_embeddings=3))
    before = collection.dense_weight("t")
    recluster(collection, seed=0)
    torch.testing.assert_close(collection.dense_weight("t"), before)
    out = collection(make_kjt({"f": [[0, 2]]}))["f"]
    torch.testing.assert_close(out[0].detach(), before[0] + before[2])
