"""A TorchRec script as it is, with and without compressed tables swapped in, on one rank and on two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import ROOT

SCRIPT = Path(__file__).with_name("dlrm_script.py")
STEPS = 48
RULES = """
rules:
  - tables: t_u.*
    method: ce
    num_params: 3200
  - min_num_embeddings: 1000
    method: cce
    compression: 16
recluster: {every_steps: 12, stop_after_fraction: 0.6}
"""

pytestmark = pytest.mark.distributed


def run_script(
    folder: Path, world_size: int, *, swap: bool, rules: str = RULES, epochs: int = 1
) -> tuple[list[dict[str, Any]], str]:
    """What each rank found, and what was printed."""
    config = folder / "swap.yaml"
    config.write_text(rules)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    by_swap = ["-m", "cce_torchrec.swap", "--config", str(config)] if swap else []
    ours = [str(SCRIPT), "--out", str(folder), "--steps", str(STEPS // epochs), "--epochs", str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *by_swap, *ours],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)], done.stdout


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_script_as_it_is(tmp_path: Path, world_size: int) -> None:
    ranks, printed = run_script(tmp_path, world_size, swap=True)
    for result in ranks:
        assert result["collection"] == "ShardedCompressedEmbeddingBagCollection"
        weights = {n.split("embedding_bags.")[1]: s for n, s in result["state"].items() if n.endswith(".weight")}
        assert weights["t_item:0.weight"] == [250, 4]
        assert weights["t_user:0.weight"] == [200, 4]
        assert weights["t_day.weight"] == [7, 16]
        assert list(result["versions"].values()) == [2]  # after steps 12 and 24 of 48; ce has nothing to learn
        assert set(result["placements"].values()) == {"data_parallel"}, "small codebooks, by our constraints"
        assert len(result["losses"]) == STEPS
        assert mean(result["losses"][-8:]) < 0.7 * mean(result["losses"][:4])
        assert mean(result["losses"][-8:]) < 0.45
    assert printed.count("was replaced") == printed.count("re-clustered after step 12") == 1, "by the first rank alone"
    assert "re-clustered after step 24" in printed
    assert "re-clustered after step 36" not in printed
    assert [ranks[0]["state"]] * world_size == [result["state"] for result in ranks]


@pytest.mark.parametrize(
    ("recluster", "steps"),
    [
        ("{every_steps: 6, stop_after_fraction: 0.5}", [6, 12, 30, 36]),  # the first half of each epoch
        ("{every_steps: 6, stop_after_fraction: 0.5, epochs: 2}", [6, 12, 18, 24]),
        ("{every_steps: 6, stop_after_fraction: 0.5, total_steps: 26}", [6, 12]),
        ("{every_steps: 6, background_steps: 3, total_steps: 26}", [9, 15, 21]),
    ],
)
def test_when_it_stops(tmp_path: Path, recluster: str, steps: list[int]) -> None:
    """Two epochs of 24 steps, of which the script says nothing but by its loader."""
    rules = RULES[: RULES.index("recluster:")] + f"recluster: {recluster}\n"
    ranks, printed = run_script(tmp_path, 1, swap=True, rules=rules, epochs=2)
    assert len(ranks[0]["losses"]) == STEPS
    assert [int(step) for step in re.findall(r"re-clustered after step (\d+):", printed)] == steps


def test_without_it_nothing_is_changed(tmp_path: Path) -> None:
    ranks, printed = run_script(tmp_path, 2, swap=False)
    assert {result["collection"] for result in ranks} == {"ShardedEmbeddingBagCollection"}
    assert "cce_torchrec" not in printed
