"""Ids are counted in training, by themselves; those seen most often, and often enough, get stored assignments."""

import copy
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import (
    CCE,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    CompressionRule,
    ReclusterConfig,
    ResidualCCE,
    compress,
    recluster,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.id_counts import CountsById
from tests.unit.cce_tables import assert_same_state, build, cce_table, state_copy

V, DIM = 120, 8


def warm_method(**fields: object) -> CCE:
    return CCE(**{"num_rows": 6, "num_columns": 2, "num_assigned_ids": 10, **fields})


def bags(seed: int, features: int = 1, size: int = V) -> KeyedJaggedTensor:
    """Skewed ids, in bags of 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (features * 16,), generator=generator)
    ids = (size * torch.rand(int(lengths.sum()), generator=generator) ** 3).long()
    return KeyedJaggedTensor([f"f_{name}" for name in "tuv"[:features]], ids, lengths=lengths)


def train(collection: CompressedEmbeddingBagCollection, *batches: KeyedJaggedTensor) -> None:
    for batch in batches:
        collection(batch).values().square().mean().backward()


def counted(collection: CompressedEmbeddingBagCollection, table: str = "t") -> dict[int, int]:
    ids_U, counts_U1 = collection.id_counts.by_table[table].sums().sums()
    assert counts_U1.dtype == torch.int64
    return dict(zip(ids_U.tolist(), counts_U1[:, 0].tolist(), strict=True))


def most_seen(counts: Counter[int], slots: int, least: int = 1) -> list[int]:
    """By brute force: the largest counts, the lower of equal ids."""
    enough = [v for v in counts if counts[v] >= least]
    return sorted(sorted(enough, key=lambda v: (-counts[v], v))[:slots])


def warm_ids(collection: CompressedEmbeddingBagCollection, table: str = "t") -> list[int]:
    warm = collection.state_dict()[f"_row_maps.{table}.warm_ids"]
    return warm[warm >= 0].tolist()


def test_counts_are_those_of_a_loop() -> None:
    generator, counts, expected = torch.Generator().manual_seed(0), CountsById(), Counter()
    for step in range(60):  # 240,000 ids: merged several times
        ids_N = torch.randint(90_000, (4000,), generator=generator)
        counts.add(ids_N)
        expected.update(ids_N.tolist())
        if step == 30:
            counts.sums().sums()
    ids_U, counts_U1 = counts.sums().sums()
    assert dict(zip(ids_U.tolist(), counts_U1[:, 0].tolist(), strict=True)) == expected


def test_all_features_of_the_tables_that_need_it_are_counted() -> None:
    tables = [
        cce_table(V, name="t", method=warm_method()),
        cce_table(V, name="w", method=ResidualCCE(num_rows=5, num_columns=2, num_assigned_ids=7)),
        cce_table(V, name="v"),
    ]
    tables[1].feature_names = ["f_u", "f_t"]
    collection = build(*tables)
    batches = [bags(seed, 3) for seed in range(4)]
    train(collection, *batches)
    assert list(collection.id_counts.by_table) == ["t", "w"]
    expected = Counter(v for batch in batches for v in batch["f_t"].values().tolist())
    assert counted(collection) == expected
    expected.update(v for batch in batches for v in batch["f_u"].values().tolist())
    assert counted(collection, "w") == expected


def test_what_is_not_training_is_not_counted() -> None:
    collection = build(cce_table(V, method=warm_method()))
    with torch.no_grad():
        collection(bags(1))
    collection.eval()
    collection(bags(2))
    assert counted(collection) == {}
    collection.train()
    collection(bags(3))
    assert counted(collection) == Counter(bags(3).values().tolist())


def test_an_id_out_of_bounds_counts_as_id_0_which_is_looked_up() -> None:
    table = cce_table(V, method=warm_method())
    collection = CompressedEmbeddingBagCollection(tables=[table], bounds_check_mode=BoundsCheckMode.IGNORE)
    batch = KeyedJaggedTensor(["f_t"], torch.tensor([5, V, -1, V - 1]), lengths=torch.tensor([4]))
    train(collection, batch)
    assert counted(collection) == {0: 2, 5: 1, V - 1: 1}
    collection.grow("t", V + 1)
    train(collection, batch)
    assert counted(collection) == {0: 3, 5: 2, V - 1: 2, V: 1}
    recluster(collection, seed=0)
    assert warm_ids(collection) == [0, 5, V - 1, V]


@pytest.mark.parametrize("least", [1, 2, 5])
def test_the_ids_seen_most_often_become_warm(least: int) -> None:
    """Again and again: counts go on over re-clusterings."""
    collection = build(cce_table(V, method=warm_method(min_id_count=least)))
    expected = Counter()
    for seed in range(6):
        for part in range(3):
            train(collection, bags(3 * seed + part))
            expected.update(bags(3 * seed + part).values().tolist())
        if most_seen(expected, 10, least):
            recluster(collection, seed=seed)
            assert warm_ids(collection) == most_seen(expected, 10, least)
    assert len(warm_ids(collection)) == 10


def test_ids_below_the_threshold_leave_slots_free() -> None:
    collection = build(cce_table(V, method=warm_method(min_id_count=3, num_assigned_ids=50)))
    train(collection, *(bags(seed) for seed in range(2)))
    counts = Counter(v for seed in range(2) for v in bags(seed).values().tolist())
    recluster(collection, seed=0)
    expected = sorted(v for v, count in counts.items() if count >= 3)
    assert 0 < len(expected) < 50
    assert warm_ids(collection) == expected


def test_counts_choose_ids_and_do_not_weigh_them() -> None:
    """As weights that are all the same but for a last bit, which tells which ids to take."""
    collection = build(cce_table(V, method=warm_method(num_assigned_ids=3)))
    other = copy.deepcopy(collection)
    train(collection, *(bags(seed) for seed in range(3)))
    warm = most_seen(Counter(v for seed in range(3) for v in bags(seed).values().tolist()), 3)
    weights_V = torch.full((V,), 1.0)
    weights_V[warm] += 2**-20
    recluster(collection, seed=5)
    recluster(other, seed=5, id_weights={"t": weights_V})
    assert warm_ids(collection) == warm_ids(other) == warm
    torch.testing.assert_close(collection.dense_weight("t"), other.dense_weight("t"), rtol=1e-4, atol=1e-5)


def test_given_weights_decide_instead_of_counts() -> None:
    collection = build(cce_table(V, method=warm_method(min_id_count=3)))
    train(collection, *(bags(seed) for seed in range(3)))
    weights_V = torch.zeros(V)
    weights_V[[100, 110, 111]] = torch.tensor([3.0, 2.0, 9.0])
    recluster(collection, seed=0, id_weights={"t": weights_V})
    assert warm_ids(collection) == [100, 111]
    before = state_copy(collection)
    with pytest.raises(
        ValueError, match=r"\['t'\] has a maximum of 2.0, but min_id_count=3 takes ids of weights above 2"
    ):
        recluster(collection, seed=0, id_weights={"t": weights_V.clamp(max=2)})
    assert_same_state(collection, before)


def test_where_nothing_was_seen_the_remedy_is_said() -> None:
    collection = build(cce_table(V, name="s"), cce_table(V, method=warm_method()))
    before = state_copy(collection)
    with pytest.raises(
        ValueError, match=r"'t' stores assignments of the 10 ids seen most often.*id_weights=\{'t': \.\.\.\}"
    ):
        recluster(collection, seed=0)
    assert_same_state(collection, before)
    report = recluster(collection, seed=0, id_weights={"t": torch.ones(V)})
    assert [table.table for table in report.tables] == ["s", "t"]
    assert warm_ids(collection) == list(range(10))


def test_a_table_of_which_no_id_was_seen_often_enough_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    collection = build(cce_table(V, name="s"), cce_table(V, method=warm_method(min_id_count=1000)))
    collection(KeyedJaggedTensor(["f_s", "f_t"], torch.tensor([1, 2]), lengths=torch.tensor([1, 1])))
    before = collection.dense_weight("t")
    with caplog.at_level(logging.WARNING, "cce_torchrec"):
        report = recluster(collection, seed=0)
    assert [table.table for table in report.tables] == ["s"]
    assert torch.equal(collection.dense_weight("t"), before)
    assert "'t' is not re-clustered: no id was seen 1000 times" in caplog.text


@pytest.mark.parametrize("count", [0, 2.5])
def test_bad_thresholds(count: object) -> None:
    with pytest.raises(ValueError, match=f"min_id_count={count} is not a positive integer"):
        warm_method(min_id_count=count)


@pytest.mark.parametrize("method", [CCE, ResidualCCE])
def test_a_threshold_needs_a_number_of_slots(method: type[CCE]) -> None:
    with pytest.raises(ValueError, match="min_id_count=2 needs num_assigned_ids"):
        method(num_rows=6, num_columns=2, min_id_count=2)
    fixed = {"num_assigned_ids": 30, "min_id_count": 4}
    assert method.from_budget(V, DIM, 400, **fixed).min_id_count == 4
    rule = CompressionRule(method=method.key, compression=2, options=fixed)
    assert rule.method_for(V, DIM).min_id_count == 4


def test_a_checkpoint_loads_under_another_threshold() -> None:
    """What is stored is the same."""
    one, other = (build(cce_table(V, method=warm_method(min_id_count=count)), seed=count) for count in (1, 9))
    other.load_state_dict(one.state_dict())
    assert_same_state(other, state_copy(one))
    assert one.memory_report().tables == other.memory_report().tables


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_resumed_training_goes_on_with_its_counts(tmp_path: Path) -> None:
    def fresh() -> tuple[CompressedEmbeddingBagCollection, torch.optim.Optimizer]:
        collection = build(cce_table(V, method=warm_method(min_id_count=2)))
        return collection, torch.optim.SGD(collection.parameters(), lr=0.5)

    def go_on(collection: CompressedEmbeddingBagCollection, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            train(collection, bags(seed))
            optimizer.step()

    collection, optimizer = fresh()
    go_on(collection, optimizer, range(4))
    recluster(collection, seed=0)
    save_checkpoint(tmp_path, collection)
    resumed, its_optimizer = fresh()
    train(resumed, bags(77))  # is forgotten
    load_checkpoint(tmp_path, resumed)
    for one, its in ((collection, optimizer), (resumed, its_optimizer)):
        go_on(one, its, range(4, 7))
        recluster(one, seed=1, config=ReclusterConfig(gradient_step=0.0))
    assert counted(resumed) == counted(collection) == Counter(v for s in range(7) for v in bags(s).values().tolist())
    assert_same_state(resumed, state_copy(collection))
    assert warm_ids(resumed) != most_seen(Counter(v for s in range(4, 7) for v in bags(s).values().tolist()), 10, 2)


def trained_table() -> tuple[EmbeddingBagCollection, Tensor]:
    torch.manual_seed(0)
    config = EmbeddingBagConfig(name="t", num_embeddings=V, embedding_dim=DIM, feature_names=["f_t"])
    collection = EmbeddingBagCollection(tables=[config])
    return collection, collection.embedding_bags["t"].weight.detach().clone()


def test_a_trained_table_is_compressed_by_given_weights() -> None:
    """A row for each warm id, and that of the others: warm ids keep their vectors, others hardly count in mean residuals."""
    weights_V = torch.zeros(V)
    weights_V[60:72] = torch.arange(1.0, 13.0)
    weights_V[:62] = 1e-6
    full, old_VD = trained_table()
    method = warm_method(num_rows=11, min_id_count=3)
    compressed = compress(full, {"t": method}, from_trained=True, id_weights={"t": weights_V})
    assert warm_ids(compressed) == list(range(62, 72))
    torch.testing.assert_close(compressed.dense_weight("t")[62:72], old_VD[62:72], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        (None, {}, r"'t' stores assignments of the 10 ids seen most often.*pass id_weights=\{'t'"),
        ({"t": torch.ones(V - 1)}, {}, rf"id_weights\['t'\] must be \[{V}\]"),
        ({"t": torch.ones(V)}, {"min_id_count": 2}, "min_id_count=2 takes ids of weights above 1"),
        ({"u": torch.ones(V)}, {}, r"There is no table \['u'\]"),
    ],
)
def test_weights_that_a_trained_table_cannot_have(
    weights: dict[str, Tensor] | None, fields: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compress(trained_table()[0], {"t": warm_method(**fields)}, from_trained=True, id_weights=weights)


def test_weights_are_for_trained_tables() -> None:
    with pytest.raises(ValueError, match="id_weights is for tables that are fitted to trained ones"):
        compress(trained_table()[0], {"t": warm_method()}, id_weights={"t": torch.ones(V)})


def test_a_plain_config_does_not_count() -> None:
    table = CompressedEmbeddingBagConfig(
        name="t", num_embeddings=V, embedding_dim=DIM, feature_names=["f_t"], method=CCE(num_rows=6, num_columns=2)
    )
    assert not table.method.counts_ids
    assert build(table).id_counts.by_table == {}


@pytest.mark.parametrize("weighted", [False, True])
def test_hot_ids_are_among_those_with_assignments(weighted: bool) -> None:
    collection = build(cce_table(V, method=warm_method(num_hot_ids=2, min_id_count=3)))
    train(collection, KeyedJaggedTensor(["f_t"], torch.tensor([1, 50, 51, 2] * 3 + [0, 3]), lengths=torch.tensor([14])))
    weights_V = torch.zeros(V)
    weights_V[[0, 1, 50, 51]] = torch.tensor([2.0, 4.0, 3.0, 3.5])
    recluster(collection, seed=0, id_weights={"t": weights_V} if weighted else {})
    assert warm_ids(collection) == ([1, 50, 51] if weighted else [1, 2, 50, 51])
    is_hot_V = collection.lowered_tables[0].row_map.main_rows(torch.arange(V))[0] >= 6
    assert is_hot_V.nonzero().view(-1).tolist() == ([1, 51] if weighted else [1])
