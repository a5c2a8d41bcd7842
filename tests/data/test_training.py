"""Raw Parquet, prepared and trained on, from the command line."""

from pathlib import Path

import pytest

from dlrm_example.data.manifest import read_manifest
from dlrm_example.data.prepare import main as prepare
from dlrm_example.records import read_summary
from dlrm_example.train import main as train
from tests.data.rows import COLUMNS, raw_rows, write

SMALL = "--dataset_name parquet --epochs 2 --batch_size 64 --embedding_dim 8 --dense_arch_layer_sizes 8"
SMALL += (
    " --over_arch_layer_sizes 8,1 --method cce --compression 1.2 --min_compressed_rows 8 --checkpoint_every_epochs 0"
)


def test_from_raw_parquet_to_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = raw_rows(800)
    for row in rows:
        row["y"] = int(row["u"] is None or row["u"] % 2 == 0)  # what the ids tell
    write(tmp_path / "raw" / "x.parquet", rows)
    assert prepare(["--input", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared"), *COLUMNS]) == 0
    flags = [*SMALL.split(), "--run_dir", str(tmp_path / "run"), "--dense_columns", "a", "--sparse_columns", "u,tags"]
    assert train([*flags, "--data_path", str(tmp_path / "raw")]) == 1
    assert "make one with: python -m dlrm_example.data.prepare" in capsys.readouterr().err
    assert train([*flags, "--data_path", str(tmp_path / "prepared"), "--method", "full", "--compression", "1"]) == 0
    summary = read_summary(tmp_path / "run")
    assert summary.best_val_auroc > 0.9
    sizes = {column.name: column.num_embeddings for column in read_manifest(tmp_path / "prepared").sparse}
    assert summary.full_embedding_params == 8 * (sizes["u"] + sizes["tags"])
    assert train([*flags, "--data_path", str(tmp_path / "prepared"), "--overwrite"]) == 0
