"""What a user did wrong ends in one line and an exit code, never in a traceback."""

from pathlib import Path

import pytest

from dlrm_example import quickstart, train
from dlrm_example.commands import exit_code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--embedding_dim 6 --dense_arch_layer_sizes 8,6",
            "--embedding_dim is 6; FBGEMM's kernels need a multiple of 4",
        ),
        ("--seed 9223372036854775808", "it must be below 2^63"),
        ("--method cce --method_options num_columns=16", "num_columns=16: FBGEMM's kernels take no columns of 2 dims"),
    ],
)
def test_flags_that_cannot_be(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--run_dir", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_run_dir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main(["--run_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_quickstart_with_a_bad_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--run_dir", str(tmp_path), "--epochs", "0"]) == 2
    assert "--epochs is 0" in capsys.readouterr().err


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert "--resume" in capsys.readouterr().err
