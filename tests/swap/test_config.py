"""The file: what it may say, and what is refused; rules by bytes."""

from pathlib import Path

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from cce_torchrec import METHODS, CompressionRule, ReclusterConfig, ReclusterSchedule, compress
from cce_torchrec.memory import stored_bytes
from cce_torchrec.swap.__main__ import main
from cce_torchrec.swap.config import SwapConfig


def load(tmp_path: Path, text: str) -> SwapConfig:
    (tmp_path / "swap.yaml").write_text(text)
    return SwapConfig.load(tmp_path / "swap.yaml")


def test_everything_a_file_may_say(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        rules:  # first match wins
          - {tables: "t_(a|b)", method: cce, options: {num_rows: 32, num_columns: 4}}
          - {min_num_embeddings: 5000, method: ce, budget_bytes: 4000}
        recluster: {every_steps: 50, stop_after_fraction: 0.5, total_steps: 300, optimizer_state: carry, seed: 4}
        """,
    )
    assert config.rules == (
        CompressionRule(tables="t_(a|b)", method="cce", options={"num_rows": 32, "num_columns": 4}),
        CompressionRule(min_num_embeddings=5000, method="ce", budget_bytes=4000),
    )
    carry = ReclusterConfig(optimizer_state="carry")
    assert config.schedule == ReclusterSchedule(
        total_steps=300, every_steps=50, stop_after_fraction=0.5, seed=4, config=carry
    )
    assert config.schedule.steps == (50, 100, 150)


def test_a_training_of_unknown_length(tmp_path: Path) -> None:
    schedule = load(tmp_path, "rules: [{method: ce, compression: 2}]\nrecluster: {every_steps: 5}").schedule
    assert schedule is not None
    assert [step for step in range(17) if schedule.is_due(step)] == [5, 10, 15]
    with pytest.raises(ValueError, match="unknown length"):
        _ = schedule.steps
    with pytest.raises(ValueError, match="needs every_steps"):
        ReclusterSchedule(total_steps=None)


def test_as_many_epochs_as_the_script_trains(tmp_path: Path) -> None:
    config = load(tmp_path, "rules: [{method: ce, compression: 2}]\nrecluster: {every_steps: 5, epochs: 3}")
    assert config.epochs == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [", "cannot be read as YAML"),
        ("- a", "not a mapping"),
        ("rules: []", "not a list with a rule"),
        ("rule: [{method: cce}]", r"unknown keys \['rule'\]; the keys are rules, recluster"),
        ("rules: [cce]", "rule 1 is 'cce', not a mapping"),
        ("rules: [{compression: 2}]", "rule 1 has no method"),
        ("rules: [{method: cce, ratio: 2}]", "rule 1 has unknown keys"),
        ("rules: [{method: cc, compression: 2}]", "rule 1: method='cc' is unknown"),
        ("rules: [{method: cce, compression: 2, num_params: 3}]", "two budgets"),
        ("rules: [{method: cce, compression: 2, num_params: 3, budget_bytes: 4}]", "three budgets"),
        (
            "rules: [{method: cce, compression: 2, min_num_embeddings: 5e3}]",
            "min_num_embeddings='5e3' is not an integer",
        ),
        ("rules: [{method: cce, num_params: 1.5}]", "num_params=1.5 is not a positive integer"),
        ("rules: [{method: cce, budget_bytes: 2e9}]", "rule 1: budget_bytes='2e9' is not a positive integer"),
        ("rules: [{method: cce, budget_bytes: 0}]", "budget_bytes=0 is not a positive integer"),
        ("rules: [{method: cce, compression: 2, tables: [a]}]", r"tables=\['a'\] is not a regular expression"),
        (
            "rules: [{method: cce, compression: 2, options: [num_rows]}]",
            r"options=\['num_rows'\] is no mapping of fields",
        ),
        ("rules: [{method: ce, compression: 2}]\nrecluster: 5", "recluster is 5, not a mapping"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {steps: 5}", "unknown keys"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {seed: 5}", "needs every_steps, or total_steps"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {every_steps: 5, count: 2}", "give one"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {every_steps: 0}", "not a positive integer"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {every_steps: 5, epochs: 0}", "epochs=0 is not a positive"),
        ("rules: [{method: ce, compression: 2}]\nrecluster: {total_steps: 5, epochs: 2}", "give one"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, text)
    assert "swap.yaml" in str(error.value)


@pytest.mark.parametrize("key", [key for key in METHODS if key not in ("full", "pq")])
def test_a_budget_in_bytes_is_used_up(key: str) -> None:
    """The result fits, and one more of the smallest steps of a budget in parameters would not, or changes nothing."""
    V, D, budget = 20_000, 16, 400_000
    method = CompressionRule(method=key, budget_bytes=budget).method_for(V, D)
    assert stored_bytes(method, V, D) <= budget
    for more in (1, D, 16 * D, V):
        larger = METHODS[key].from_budget(V, D, method.num_params(V, D) + more)
        assert (
            larger == method
            or stored_bytes(larger, V, D) > budget
            or larger.num_params(V, D) <= method.num_params(V, D)
        )


def test_bytes_are_what_the_report_says() -> None:
    item = EmbeddingBagConfig(name="t", num_embeddings=5000, embedding_dim=16, feature_names=["f"])
    model = compress(
        torch.nn.Sequential(EmbeddingBagCollection(tables=[item])), CompressionRule(method="cce", budget_bytes=50_000)
    )
    total = model[0].memory_report().total
    assert 48_000 < total.codebook_bytes + total.assignment_bytes <= 50_000


def test_too_few_bytes() -> None:
    rule = CompressionRule(method="cce", budget_bytes=20_000)
    with pytest.raises(ValueError, match=r"budget_bytes=20,000 is too small.*possible is 20,176"):
        rule.method_for(5000, 16)
    assert CompressionRule(method="cce", budget_bytes=20_176).method_for(5000, 16).num_params(5000, 16) == 32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["script.py"], "--config"),
        (["--config", "none.yaml", "script.py"], "cannot be read"),
        (["--config", "swap.yaml", "none.py"], "no file 'none.py'"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "swap.yaml").write_text("rules: [{method: ce, compression: 2}]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in capsys.readouterr().err
