"""Raw Parquet, prepared and trained on; stopped within an epoch, and gone on with."""

from pathlib import Path

import pytest

from dlrm_example.cli import parse_config
from dlrm_example.data import order
from dlrm_example.data import prepare as prepare_module
from dlrm_example.data.manifest import read_manifest
from dlrm_example.data.prepare import main as prepare
from dlrm_example.records import read_summary
from dlrm_example.train import main, train
from tests.data.rows import COLUMNS, raw_rows, write
from tests.example.test_interruptions import interrupted
from tests.example.test_resume import outcome

SMALL = "--dataset_name parquet --epochs 2 --batch_size 64 --embedding_dim 8 --dense_arch_layer_sizes 8"
SMALL += " --over_arch_layer_sizes 8,1 --min_compressed_rows 8 --recluster_count 3 --checkpoint_every_epochs 0"
FLAGS = [*SMALL.split(), "--dense_columns", "a", "--sparse_columns", "u,tags"]
CCE = ["--method", "cce", "--compression", "1.2"]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows whose ids tell the label."""
    rows = raw_rows(800)
    for row in rows:
        row["y"] = int(row["u"] is None or row["u"] % 2 == 0)
    write(tmp_path / "raw" / "x.parquet", rows)
    monkeypatch.setattr(prepare_module, "ROW_GROUP_ROWS", 50)
    monkeypatch.setattr(order, "BLOCK_ROWS", 150)
    assert prepare(["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS]) == 0
    return tmp_path / "prepared"


def test_from_raw_parquet_to_a_summary(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--run_dir", str(prepared.parent / "run")]
    assert main([*flags, "--data_path", str(prepared.parent / "raw")]) == 1
    assert "make one with: python -m dlrm_example.data.prepare" in capsys.readouterr().err
    assert main([*flags, "--data_path", str(prepared)]) == 0
    summary = read_summary(prepared.parent / "run")
    assert summary.best_val_auroc > 0.9
    sizes = {column.name: column.num_embeddings for column in read_manifest(prepared).sparse}
    assert summary.full_embedding_params == 8 * (sizes["u"] + sizes["tags"])


def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_was_not(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FLAGS, *CCE, "--data_path", str(prepared), "--run_dir"]
    undisturbed = parse_config([*flags, str(prepared.parent / "undisturbed")])
    expected = outcome(undisturbed, train(undisturbed))
    stopped = [*flags, str(prepared.parent / "stopped")]
    interrupted(parse_config(stopped), monkeypatch, 14)
    config = parse_config([*stopped, "--resume"])
    assert outcome(config, train(config)) == expected
