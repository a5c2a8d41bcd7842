"""When re-clusterings happen."""

import logging

import pytest
import torch

from cce_torchrec import ReclusterConfig, ReclusterSchedule, recluster
from tests.unit.cce_tables import Snapshot, assert_same_state, build, state_copy

V = 300

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"total_steps": 1000, "count": 4}, (200, 400, 600, 800)),
        ({"total_steps": 3000}, (400, 800, 1200, 1600, 2000, 2400)),
        ({"total_steps": 30, "count": 6}, (4, 8, 12, 16, 20, 24)),
        ({"total_steps": 10, "count": 3, "stop_after_fraction": 1.0}, (3, 6, 10)),
        ({"total_steps": 1000, "count": 1, "stop_after_fraction": 0.5}, (500,)),
        ({"total_steps": 5, "count": 100, "stop_after_fraction": 1.0}, (1, 2, 3, 4, 5)),
        ({"total_steps": 1}, ()),
        ({"total_steps": 1000, "every_steps": 250}, (250, 500, 750)),
        ({"total_steps": 1000, "every_steps": 200}, (200, 400, 600, 800)),
        ({"total_steps": 1000, "every_steps": 200, "stop_after_fraction": 1.0}, (200, 400, 600, 800, 1000)),
        ({"total_steps": 1000, "every_steps": 801}, ()),
        ({"total_steps": 10, "every_steps": 1, "stop_after_fraction": 0.35}, (1, 2, 3)),
    ],
)
def test_steps(fields: dict, steps: tuple[int, ...]) -> None:
    assert ReclusterSchedule(**fields).steps == steps


def test_fires_only_when_due() -> None:
    collection = build()
    schedule = ReclusterSchedule(total_steps=10, count=2)
    fired = {}
    for step in range(1, 11):
        before = state_copy(collection)
        report = schedule.step(step, collection)
        if report is None:
            assert_same_state(collection, before)
        else:
            fired[step] = report.tables[0].version
    assert fired == {4: 1, 8: 2}


def test_a_resumed_run_goes_on_as_it_would_have() -> None:
    schedule = ReclusterSchedule(total_steps=10, count=2, seed=3)
    whole, resumed = build(), build(seed=1)
    schedule.step(4, whole)
    resumed.load_state_dict(state_copy(whole))
    for collection in (whole, resumed):
        ReclusterSchedule(total_steps=10, count=2, seed=3).step(8, collection)
    assert_same_state(resumed, whole.state_dict())


def test_each_step_and_seed_draws_anew() -> None:
    helpers = []
    for seed, step in ((0, 4), (0, 8), (1, 4)):
        collection = build()
        ReclusterSchedule(total_steps=10, count=2, seed=seed).step(step, collection)
        helpers.append(Snapshot.of(collection).helpers_VC)
    assert not any(torch.equal(helpers[i], helpers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_config_and_optimizer_are_passed_on() -> None:
    collection = build()
    optimizer = torch.optim.Adam(collection.parameters())
    for parameter in collection.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ReclusterSchedule(total_steps=10, count=1).step(8, collection, optimizer=optimizer)
    book = collection.codebook("t:0")
    torch.testing.assert_close(optimizer.state[book]["exp_avg"][:12], torch.full((12, 4), 0.1))  # carried, not zero
    schedule = ReclusterSchedule(total_steps=10, count=1, config=ReclusterConfig(optimizer_state="reset"))
    schedule.step(8, collection, optimizer=optimizer)
    assert not optimizer.state[book]["exp_avg"].any()


def test_says_so_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cce_torchrec"):
        report = ReclusterSchedule(total_steps=10, count=1).step(8, build())
    (record,) = caplog.records
    assert record.getMessage() == f"Re-clustered after step 8 of 10:\n{report}"


def test_a_model_with_nothing_to_recluster_is_told_when_it_is_due() -> None:
    schedule = ReclusterSchedule(total_steps=10, count=1)
    assert schedule.step(7, torch.nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="no table to re-cluster"):
        schedule.step(8, torch.nn.Linear(1, 1))


def test_recluster_uses_the_default_config_where_none_is_given() -> None:
    first, second = build(), build()
    recluster(first, seed=0)
    recluster(second, seed=0, config=ReclusterConfig())
    assert_same_state(first, second.state_dict())
