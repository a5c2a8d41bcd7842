"""Raw Parquet, prepared and trained on; stopped within an epoch, and gone on with."""

import shlex
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


def test_from_raw_parquet_to_a_summary(prepared: Path) -> None:
    flags = [*FLAGS, "--run_dir", str(prepared.parent / "run")]
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


@pytest.mark.parametrize("chosen", ["", "--label_column y --dense_columns a --sparse_columns u,tags"])
def test_of_raw_parquet_an_error_gives_the_command_that_prepares_it(
    chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of files, hive partitions and all; which then trains."""
    for day in (1, 2):
        write(tmp_path / "my logs" / f"day={day}" / "x.parquet", raw_rows(300, day))
    flags = [*SMALL.split(), "--limit_train_batches", "2", "--run_dir", str(tmp_path / "run"), *chosen.split()]
    assert main([*flags, "--data_path", str(tmp_path / "my logs")]) == 1
    said = capsys.readouterr().err
    command = shlex.split(said.splitlines()[1])
    assert command[:3] == ["python", "-m", "dlrm_example.data.prepare"]
    assert prepare(command[3:]) == 0
    out = command[command.index("--out") + 1]
    assert main([*flags, "--data_path", out]) == 0
    manifest = read_manifest(Path(out))
    expected = (("a",), ["u", "tags"]) if chosen else (("row", "a"), ["u", "i", "tags", "ts", "day"])
    assert (manifest.dense, [column.name for column in manifest.sparse]) == expected


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "nowhere does not exist"), ("", "nor Parquet to prepare; see python -m")]
)
def test_without_parquet_there_is_no_such_command(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL.split(), "--run_dir", str(tmp_path / "run"), "--data_path", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err
