"""Re-clustering beside the training: what is committed, and what may not be done meanwhile.

The oracle of what training adds in the meantime is a loop over ids and rows in float64.
"""

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cce_torchrec import (
    CCE,
    CCERobe,
    CompressedEmbeddingBagCollection,
    ReclusterConfig,
    ReclusterSchedule,
    ResidualCCE,
    recluster,
    recluster_in_background,
    record_gradients,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.methods.base import RowMethod
from tests.unit.cce_tables import assert_same_state, build, cce_table, state_copy
from tests.unit.oracles import make_kjt

V = 300
METHODS: dict[str, Any] = {
    "cce": CCE(num_rows=12, num_columns=2),
    "residual": ResidualCCE(num_rows=6, num_levels=3, num_columns=2),
    "hot_ids": CCE(num_rows=12, num_columns=2, num_hot_ids=5),
    "residual_hot_ids": ResidualCCE(num_rows=6, num_levels=3, num_columns=2, num_hot_ids=5),
    "some_assigned": CCE(num_rows=12, num_columns=2, num_assigned_ids=40),
    "bit_packed": CCE(num_rows=12, num_columns=2, bit_packed=True),
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),  # as meant
]


def collection_of(method: Any, num_embeddings: int = V) -> CompressedEmbeddingBagCollection:
    collection = build(cce_table(num_embeddings, method=method))
    collection(make_kjt({"f_t": [list(range(60)) * 2]})).values().sum().backward()  # ids that are seen
    return collection


def train(module: nn.Module) -> None:
    """A step, as far as a re-clustering cares."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


def rows_of(collection: CompressedEmbeddingBagCollection) -> Tensor:
    return collection.lowered_tables[0].row_map.rows(torch.arange(V))


def caught_up(
    books: list[Tensor], new_rows_CVR: Tensor, moved_VD: Tensor, weights_V: Tensor, num_hot_from: int, num_hot: int
) -> Tensor:
    """The vectors after a commit, [V, D]: new codebooks moved by means over their ids, codebook after codebook."""
    vectors = []
    for book, rows_VR, moved in zip(books, new_rows_CVR.tolist(), moved_VD.chunk(len(books), dim=1), strict=True):
        book, left = book.double().clone(), moved.double().clone()
        for place in range(len(rows_VR[0])):
            ids: dict[int, list[int]] = {}
            for v, rows in enumerate(rows_VR):
                if not (place > 0 and num_hot_from <= rows[0] < num_hot_from + num_hot):
                    ids.setdefault(rows[place], []).append(v)
            for row, those in ids.items():
                mean = sum(weights_V[v] * left[v] for v in those) / sum(weights_V[v] for v in those)
                is_hot = num_hot_from <= row < num_hot_from + num_hot
                book[row] += mean / len(rows_VR[0]) if is_hot else mean
                for v in those:
                    left[v] -= mean
        vectors.append(torch.stack([sum(book[row] for row in rows) for rows in rows_VR]))
    return torch.cat(vectors, dim=1)


@pytest.mark.parametrize("name", METHODS)
def test_with_no_step_between_it_is_a_reclustering(name: str) -> None:
    expected, collection = collection_of(METHODS[name]), collection_of(METHODS[name])
    said = recluster(expected, seed=3)
    report = recluster_in_background(collection, seed=3).commit()
    assert_same_state(collection, expected.state_dict())
    for found, wanted in zip(report.tables, said.tables, strict=True):
        assert (found.version, found.relative_squared_error) == (wanted.version, wanted.relative_squared_error)
        assert (found.moved_fraction, found.empty_clusters) == (wanted.moved_fraction, wanted.empty_clusters)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_rows_move_by_the_mean_of_what_their_ids_learned(name: str, is_weighted: bool) -> None:
    collection = collection_of(METHODS[name])
    weights_V = torch.rand(V, generator=torch.Generator().manual_seed(1)) + 0.1 if is_weighted else torch.ones(V)
    weights = {"t": weights_V} if is_weighted else None
    unmoved = copy.deepcopy(collection)
    recluster(unmoved, seed=3, id_weights=weights)
    before_VD = collection.dense_weight("t").double()
    under_way = recluster_in_background(collection, seed=3, id_weights=weights)
    train(collection)
    moved_VD = collection.dense_weight("t").double() - before_VD
    under_way.commit()
    assert torch.equal(rows_of(collection), rows_of(unmoved))
    lowered = unmoved.lowered_tables[0]
    books = [unmoved.codebook(name).detach() for name in lowered.physical_names]
    row_map: Any = lowered.row_map
    expected_VD = caught_up(
        books, rows_of(unmoved), moved_VD, weights_V.double(), row_map.num_main_rows, row_map.storage.num_hot_ids
    )
    torch.testing.assert_close(collection.dense_weight("t").double(), expected_VD, rtol=1e-5, atol=1e-5)
    assert (collection.dense_weight("t") - unmoved.dense_weight("t")).abs().max() > 0.1  # what was learned is there


def test_windows_move_by_the_means_of_their_cells() -> None:
    method = CCERobe(num_cells=80, num_columns=2)
    collection = collection_of(method)
    unmoved = copy.deepcopy(collection)
    recluster(unmoved, seed=3)
    before_VD = collection.dense_weight("t").double()
    under_way = recluster_in_background(collection, seed=3)
    train(collection)
    left_VD = collection.dense_weight("t").double() - before_VD
    under_way.commit()
    decoder: Any = unmoved.decoded_tables[0].decoder
    ids_V = torch.arange(V)
    expected_VD = torch.zeros_like(left_VD)
    for memory, offsets_VC in (
        (decoder.memory, decoder.main_offsets(ids_V)),
        (decoder.helper, decoder.helper_offsets(ids_V)),
    ):
        cells_VD = (offsets_VC[..., None] + torch.arange(decoder.width)).flatten(1) % len(memory)
        flat, sums = cells_VD.tolist(), torch.zeros(len(memory), 2, dtype=torch.float64)
        for v in range(V):
            for d, cell in enumerate(flat[v]):
                sums[cell] += torch.tensor([left_VD[v, d], 1.0])
        means = torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], 0)
        left_VD = left_VD - means[cells_VD]
        expected_VD += (memory.detach().double() + means)[cells_VD]
    torch.testing.assert_close(collection.dense_weight("t").double(), expected_VD, rtol=1e-5, atol=1e-5)


def test_a_large_table_is_caught_up_by_a_sample_of_its_ids() -> None:
    """All rows of a codebook learn the same, so that any sample's means are those of all ids."""
    collection = build(cce_table(5_000))
    unmoved = copy.deepcopy(collection)
    recluster(unmoved, seed=3)
    under_way = recluster_in_background(collection, seed=3)
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter += 1
    under_way.commit()
    torch.testing.assert_close(collection.dense_weight("t"), unmoved.dense_weight("t") + 2)


def test_gradients_of_before_are_used_and_forgotten() -> None:
    expected, collection = collection_of(METHODS["cce"]), collection_of(METHODS["cce"])
    for each in (expected, collection):
        record_gradients(each)
        each(make_kjt({"f_t": [[1, 2], [3]]})).values().square().sum().backward()
    recluster(expected, seed=3)
    under_way = recluster_in_background(collection, seed=3)
    assert collection.id_gradients is not None
    assert len(collection.id_gradients.by_table["t"].sums()[0]) == 0
    under_way.commit()
    assert_same_state(collection, expected.state_dict())


def test_counts_are_those_of_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, collection = collection_of(METHODS["some_assigned"]), collection_of(METHODS["some_assigned"])
    recluster(expected, seed=3)
    wait_for_the_steps(monkeypatch, steps := threading.Event())
    under_way = recluster_in_background(collection, seed=3)
    collection(make_kjt({"f_t": [list(range(200, 260)) * 1_100]}))  # enough to be added up at once
    steps.set()
    under_way.commit()
    assert_same_state(collection, expected.state_dict())


def wait_for_the_steps(monkeypatch: pytest.MonkeyPatch, steps: threading.Event) -> None:
    """Begin to compute after these."""
    from cce_torchrec.recluster.work import CollectionWork

    compute = CollectionWork.compute

    def later(*args: Any) -> None:
        steps.wait()
        compute(*args)

    monkeypatch.setattr(CollectionWork, "compute", later)


def test_nothing_else_may_change_the_tables_meanwhile() -> None:
    collection = collection_of(METHODS["cce"])
    under_way = recluster_in_background(collection, seed=3)
    with pytest.raises(RuntimeError, match=r"commit\(\) or cancel\(\)"):
        recluster(collection, seed=3)
    with pytest.raises(RuntimeError, match=r"commit\(\) or cancel\(\)"):
        recluster_in_background(collection, seed=3)
    with pytest.raises(RuntimeError, match=r"commit\(\) or cancel\(\)"):
        collection.grow("t", 400)
    under_way.commit()
    collection.grow("t", 400)


def test_one_that_is_cancelled_changes_nothing() -> None:
    collection = collection_of(METHODS["cce"])
    before = state_copy(collection)
    recluster_in_background(collection, seed=3).cancel()
    assert_same_state(collection, before)
    assert recluster(collection, seed=3).tables[0].version == 1


@pytest.mark.parametrize("is_early", [True, False])
def test_weights_that_are_not_finite_are_refused_by_the_commit(is_early: bool) -> None:
    collection = collection_of(METHODS["cce"])
    good = 1.0
    if is_early:
        collection.codebook("t:0").data[3, 0] = torch.nan
    under_way = recluster_in_background(collection, seed=3)
    if not is_early:
        collection.codebook("t:0").data[3, 0] = torch.nan
    before = state_copy(collection)
    with pytest.raises(ValueError, match="Table 't': 1 of 96 weights of column 0 are NaN"):
        under_way.commit()
    for name, tensor in collection.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    collection.codebook("t:0").data[3, 0] = good
    recluster(collection, seed=3)  # nothing is under way any more


def test_a_copy_of_the_model_has_nothing_under_way() -> None:
    collection = collection_of(METHODS["cce"])
    under_way = recluster_in_background(collection, seed=3)
    copied = copy.deepcopy(collection)
    assert copied.reclustering is None
    recluster(copied, seed=3)
    under_way.commit()
    assert_same_state(copied, collection.state_dict())


def test_optimizer_state_is_reset_by_the_commit() -> None:
    collection = collection_of(METHODS["cce"])
    optimizer = torch.optim.Adam(collection.parameters())
    optimizer.step()
    config = ReclusterConfig(optimizer_state="reset")
    under_way = recluster_in_background(collection, seed=3, optimizer=optimizer, config=config)
    optimizer.step()
    assert optimizer.state[collection.codebook("t:0")]["exp_avg"].any()
    under_way.commit()
    assert not optimizer.state[collection.codebook("t:0")]["exp_avg"].any()


@pytest.mark.parametrize("ranks", ["collectives", "collectives.alone()"])
def test_a_program_that_fails_meanwhile_ends(ranks: str) -> None:
    script = f"""
import torch
from cce_torchrec import recluster_in_background
from cce_torchrec.recluster import table_work
from tests.unit.cce_tables import build

def forever(state, *, seed, config, collectives):
    while True:
        {ranks}.all_reduce_sum(torch.zeros(1))

table_work.recluster_table = forever
recluster_in_background(build(), seed=0)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=120, check=False)
    assert done.returncode == 3


# --- by schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_commits_after_so_many_steps() -> None:
    schedule = ReclusterSchedule(total_steps=20, count=2, background_steps=3, gradient_steps=2, seed=5)
    by_hand, collection = collection_of(METHODS["cce"]), collection_of(METHODS["cce"])
    recorded = []
    for step in range(1, 21):
        for each in (by_hand, collection):
            train(each)
        report = schedule.step(step, collection)
        assert (report is not None) == (step in (11, 19))
        recorded.append(collection.id_gradients is not None)
        if step in (8, 16):
            under_way = recluster_in_background(by_hand, seed=5 * 1_000_003 + step)
        if step in (11, 19):
            under_way.commit()
            assert_same_state(collection, by_hand.state_dict())
    # Before steps 7 and 8, 15 and 16: after 6 and 7, 14 and 15.
    assert [step for step, is_on in enumerate(recorded, start=1) if is_on] == [6, 7, 14, 15]


def test_the_last_one_is_committed_at_the_end_of_the_training() -> None:
    schedule = ReclusterSchedule(total_steps=10, count=1, stop_after_fraction=0.9, background_steps=100)
    collection = collection_of(METHODS["cce"])
    assert [schedule.step(step, collection) is not None for step in (8, 9, 10)] == [False, False, True]


def test_a_schedule_of_unknown_length() -> None:
    schedule = ReclusterSchedule(total_steps=None, every_steps=4, background_steps=1)
    collection = collection_of(METHODS["cce"])
    assert [step for step in range(1, 14) if schedule.step(step, collection) is not None] == [5, 9, 13]


@pytest.mark.parametrize(
    ("fields", "shortest"), [({"count": 2}, 8), ({"every_steps": 5}, 5), ({"count": 20, "stop_after_fraction": 1}, 1)]
)
def test_two_may_not_be_under_way_at_once(fields: dict[str, Any], shortest: int) -> None:
    with pytest.raises(ValueError, match=f"background_steps={shortest} must be less than the {shortest} steps"):
        ReclusterSchedule(total_steps=20, background_steps=shortest, **fields)
    ReclusterSchedule(total_steps=20, background_steps=shortest - 1, **fields)


def test_one_that_a_checkpoint_interrupts_is_begun_again(tmp_path: Path) -> None:
    """From the gradients that were recorded for it; here the model is not trained until the checkpoint."""
    schedule = ReclusterSchedule(total_steps=10, count=1, background_steps=2, gradient_steps=1)
    whole, resumed = collection_of(METHODS["cce"]), collection_of(METHODS["cce"])
    schedule.step(7, whole)
    whole(make_kjt({"f_t": [[1, 2], [3]]})).values().square().sum().backward()
    assert schedule.step(8, whole) is None
    save_checkpoint(tmp_path / "checkpoint", whole)
    train(resumed)
    load_checkpoint(tmp_path / "checkpoint", resumed)
    for each in (whole, resumed):
        assert schedule.step(9, each) is None
        train(each)
        assert schedule.step(10, each) is not None
    assert_same_state(resumed, whole.state_dict())


def test_loading_a_checkpoint_drops_what_is_under_way(tmp_path: Path) -> None:
    collection = collection_of(METHODS["cce"])
    save_checkpoint(tmp_path / "checkpoint", collection)
    before = state_copy(collection)
    recluster_in_background(collection, seed=3)
    load_checkpoint(tmp_path / "checkpoint", collection)
    assert collection.reclustering is None
    assert_same_state(collection, before)


def test_methods_that_are_tried_are_all_that_there_are() -> None:
    from cce_torchrec import METHODS as ALL

    tried = {type(method) for method in METHODS.values()}
    assert {method for method in ALL.values() if method.reclusterable and issubclass(method, RowMethod)} == tried
