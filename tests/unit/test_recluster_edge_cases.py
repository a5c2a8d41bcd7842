"""Corners of re-clustering where something was once wrong."""

import math

import pytest
import torch

from cce_torchrec import ReclusterConfig, ReclusterSchedule, recluster
from tests.unit.cce_tables import build
from tests.unit.oracles import make_kjt


@pytest.mark.parametrize(("total", "fraction", "last"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.069, 69)])
def test_the_last_step_is_not_lost_to_rounding(total: int, fraction: float, last: int) -> None:
    assert ReclusterSchedule(total_steps=total, count=1, stop_after_fraction=fraction).steps == (last,)


@pytest.mark.parametrize("points_per_centroid", [1, 256], ids=["a sample", "all ids"])
def test_an_infinite_id_weight_is_named(points_per_centroid: int) -> None:
    weights = torch.ones(300)
    weights[5] = math.inf
    config = ReclusterConfig(points_per_centroid=points_per_centroid)
    with pytest.raises(ValueError, match=r"id_weights\['t'\]"):
        recluster(build(), seed=0, id_weights={"t": weights}, config=config)


def test_a_reset_adam_steps_as_a_fresh_one() -> None:
    bags = make_kjt({"f_t": [[v] for v in range(300)]})
    worn, fresh = build(), build()
    worn_adam = torch.optim.Adam(worn.parameters(), lr=0.1)
    for _ in range(20):
        worn_adam.zero_grad()
        (worn(bags).values() - 1).square().sum().backward()
        worn_adam.step()
    recluster(worn, seed=0, optimizer=worn_adam, config=ReclusterConfig(optimizer_state="reset"))
    fresh.load_state_dict(worn.state_dict())
    fresh_adam = torch.optim.Adam(fresh.parameters(), lr=0.1)
    for collection, adam in ((worn, worn_adam), (fresh, fresh_adam)):
        adam.zero_grad()
        (collection(bags).values() - 1).square().sum().backward()
        adam.step()
    torch.testing.assert_close(worn.dense_weight("t"), fresh.dense_weight("t"))
