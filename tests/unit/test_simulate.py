"""Simulations: against TorchRec's planner, formulas by hand, and what a file may say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Topology

from cce_torchrec import (
    CCE,
    BudgetPlan,
    CompressedEmbeddingBagCollection,
    CompressedStorageEstimator,
    FullTable,
    ReclusterConfig,
    get_sharders,
    parameter_constraints,
)
from cce_torchrec.methods.cce import CCERowMap
from cce_torchrec.planner.storage import resident_bytes
from cce_torchrec.replace import with_method
from cce_torchrec.simulate import Machine, Network, SimulationConfig, simulate
from cce_torchrec.simulate.__main__ import main
from cce_torchrec.simulate.machine import fitted_rate
from cce_torchrec.simulate.work import Message, recluster_work

FILE = """
tables:
  - {name: huge, num_embeddings: 10000000000, embedding_dim: 16, assignment_placement: sharded,
     method: cce, options: {num_rows: 64, num_columns: 4}}
  - {name: mid, count: 2, num_embeddings: 100001, embedding_dim: 16, pooling_factor: 3, method: full}
  - {name: small, num_embeddings: 500, embedding_dim: 16}
budget_bytes: 16000000000
batch_size: 32
recluster: {num_iterations: 5}
"""
# Seconds that are easy to add up.
MACHINE = Machine(
    name="imagined",
    nearest=(0.0, 1e-9, 0.0),
    iteration=(0.0, 0.0, 0.0, 1e-9, 0.0),
    seeding=(0.0, 2e-9, 0.0, 0.0),
    walk=(0.0, 1e-8, 0.0),
    network=Network(latency=1e-5, bytes_per_second=1e9),
)


def config(tmp_path: Path, text: str = FILE) -> SimulationConfig:
    (tmp_path / "model.yaml").write_text(text)
    return SimulationConfig.load(tmp_path / "model.yaml")


@pytest.mark.parametrize("world_size", [8, 100])
def test_what_is_sent_by_hand(tmp_path: Path, world_size: int) -> None:
    result, W, B = simulate(config(tmp_path), world_size), world_size, 32
    others = (W - 1) / W
    assert result.plan.methods["mid_0"] == result.plan.methods["small"] == FullTable()
    by_row = 2 * ((W - 1) * B * 4 + others * B * 3 * 4)  # lengths and rows as int32, of two tables
    assert result.sent.ids == pytest.approx(others * B * 8 + by_row)  # an id there
    assert result.sent.assignments == pytest.approx(others * B * 4 * 1)  # four bytes back
    assert result.sent.vectors == pytest.approx(2 * (W - 1) * B * 2 * 16 * 4)
    codebooks = 2 * 64 * 16 + 500 * 16  # the small one is replicated
    assert result.sent.gradients == pytest.approx(2 * others * codebooks * 4)


def test_bytes_of_every_rank(tmp_path: Path) -> None:
    """Of 100,001 rows, seven ranks have 12,501 and the last has 12,494: 7 rows of 68 bytes fewer, of two tables."""
    most, mean = simulate(config(tmp_path), 8).rank_bytes
    assert most - mean == pytest.approx(2 * 7 * 68 / 8)


def sharded_by_torchrec(plan: BudgetPlan, model: SimulationConfig, world_size: int) -> dict[str, tuple[str, int]]:
    """Sharding type, and bytes of the first rank, by logical table, as TorchRec's planner has them."""
    tables = [with_method(table, plan.methods[table.name]) for table in model.tables]
    module = nn.Sequential(CompressedEmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    topology = Topology(world_size=world_size, local_world_size=8, compute_device="cuda", hbm_cap=1 << 40)
    constraints = parameter_constraints(module, plan.constraints())
    enumerator = EmbeddingEnumerator(
        topology, batch_size=32, constraints=constraints, estimator=[CompressedStorageEstimator(topology, constraints)]
    )
    found: dict[str, tuple[str, int]] = {}
    for option in enumerator.enumerate(module, get_sharders()):
        if option.compute_kernel in ("dense", "fused"):
            name = option.name.partition(":")[0]
            bytes_ = resident_bytes(option, option.shards[0], "rowwise_adagrad")
            found[name] = (option.sharding_type, found.get(name, ("", 0))[1] + bytes_)
    return found


@pytest.mark.filterwarnings("ignore:.*The topology was constructed directly:UserWarning")
@pytest.mark.parametrize("world_size", [8, 64])
def test_placed_as_torchrecs_planner_places(tmp_path: Path, world_size: int) -> None:
    model = config(tmp_path)
    plan = simulate(model, world_size).plan
    found = sharded_by_torchrec(plan, model, world_size)
    expected = {
        table.table: (
            {"replicated": "data_parallel", "row_wise": "row_wise"}[table.placement],
            table.bytes.codebooks + table.bytes.gradients + table.bytes.optimizer,
        )
        for table in plan.tables
    }
    assert found == expected


def test_seconds_by_hand() -> None:
    row_map = CCE(num_rows=64, num_columns=4).row_map("t", 10**6, 16, torch.device("meta"))
    assert isinstance(row_map, CCERowMap)
    work = recluster_work(row_map, ReclusterConfig(num_iterations=5), 8, "cuda")
    seconds = MACHINE.seconds(work)
    points, ids = 64 * 256 // 8, 10**6 // 8
    assert seconds["fit"] == pytest.approx(4 * points * 1e-9 * (64 + 5 * 64 + 2 * 63))
    assert seconds["assign"] == pytest.approx(ids * 4 * (64 * 1e-9 + 1e-8))
    calls, sent = sum(m.calls for m in work.messages), sum(m.sent(8) for m in work.messages)
    assert seconds["communication"] == pytest.approx(calls * 1e-5 + sent / 1e9)
    assert Message("all_gather", 2, 100).sent(8) == 1400
    assert Message("all_reduce", 1, 800).sent(8) == 1400


def test_rates_are_found_again() -> None:
    counts = [(1.0, n, n * d) for n, d in ((1e3, 4.0), (1e4, 4.0), (1e3, 16.0), (1e5, 8.0))]
    rate = (2e-3, 3e-6, 0.0)
    seconds = [sum(x * y for x, y in zip(rate, row, strict=True)) for row in counts]
    assert fitted_rate(counts, seconds) == pytest.approx(rate, abs=1e-12)


def test_a_machine_is_saved_and_loaded(tmp_path: Path) -> None:
    MACHINE.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == MACHINE
    (tmp_path / "machine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no rates of a machine.*simulate\.measure"):
        Machine.load(tmp_path / "machine.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    MACHINE.save(tmp_path / "machine.json")
    files = {name: str(tmp_path / name) for name in ("model.yaml", "machine.json", "out.json")}
    words = ["--config", files["model.yaml"], "--machine", files["machine.json"], "--json", files["out.json"]]
    main([*words, "--world_sizes", "8", "1024"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ranks", "8", "1024"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["world_size"] for each in written] == [8, 1024]
    assert all(each["recluster"]["seconds"]["assign"] > 0 for each in written)
    with pytest.raises(SystemExit):
        main(["--config", files["out.json"], "--world_sizes", "8"])
    assert "is no mapping" in capsys.readouterr().err
    for wrong, says in (
        (["--world_sizes", "0"], "world_size=0"),
        (["--world_sizes", "8", "--json", str(tmp_path / "none" / "out.json")], "cannot be written"),
    ):
        with pytest.raises(SystemExit):
            main(["--config", files["model.yaml"], *wrong])
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("batch_size: 32", "", r"lacks \['batch_size'\]"),
        ("batch_size: 32", "batch_size: 0", "batch_size=0"),
        ("batch_size: 32", "batch_size: 32\nbatches: 1", r"unknown keys \['batches'\]"),
        ("name: small, ", "", r"lacks \['name'\]"),
        ("tables:", "tables: []\nmethods:", r"tables is \[\], not a list"),
        ("count: 2", "count: 0", "count=0"),
        ("500, embedding_dim: 16", "500, embedding_dim: '16'", "embedding_dim='16' is not a positive integer"),
        ("method: full", "method: cce, options: {num_rows: 4, num_columns: 5}", "table 'mid': .*num_columns=5"),
        ("method: full", "method: dhe, options: {width: 8}", "method 'dhe', which is not simulated"),
        ("num_iterations: 5", "iterations: 5", "iterations"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        config(tmp_path, FILE.replace(old, new))
    assert "model.yaml" in str(error.value)


def test_a_budget_that_is_too_small(tmp_path: Path) -> None:
    """For what is given: the huge table's assignments, old and new ones; then for the rest."""
    given = sum(t.bytes.held for t in simulate(config(tmp_path), 8).plan.tables if t.table != "small")
    for budget, says in (
        (given - 5, "5 bytes too small for the tables whose methods"),
        (given + 100, "smallest that works"),
    ):
        with pytest.raises(ValueError, match=says):
            simulate(config(tmp_path, FILE.replace("16000000000", str(budget))), 8)


@pytest.mark.parametrize(
    ("world_size", "network", "is_said"),
    [("2", "", True), ("1", "", False), ("2", "network: {latency: 0.001, bytes_per_second: 1000000000}", False)],
)
def test_seconds_without_a_network_are_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: str, network: str, is_said: bool
) -> None:
    config(tmp_path, FILE.replace("budget_bytes: 16000000000", "budget_bytes: 800000000000") + network)
    replace(MACHINE, network=None).save(tmp_path / "machine.json")
    files = ["--config", str(tmp_path / "model.yaml"), "--machine", str(tmp_path / "machine.json")]
    main([*files, "--world_sizes", world_size])
    assert ("without communication" in capsys.readouterr().out) == is_said


def test_more_ranks_hold_less(tmp_path: Path) -> None:
    results: list[Any] = [simulate(config(tmp_path), ranks) for ranks in (8, 128, 1024)]
    bytes_ = [result.rank_bytes[0] for result in results]
    assert bytes_ == sorted(bytes_, reverse=True)
