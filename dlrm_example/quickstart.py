"""Three short runs on real data: full tables, and two methods with eight times fewer parameters (`make quickstart`)."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.data import DataUnavailableError
from dlrm_example.distributed import process_group
from dlrm_example.plots import plot_runs
from dlrm_example.records import Summary
from dlrm_example.report import summary_table
from dlrm_example.train import train

logger = logging.getLogger(__name__)

COMPRESSIONS = {"full": 1.0, "hashing_trick": 8.0, "cce": 8.0}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    set_up_logging()
    started = time.perf_counter()
    folder = Path(arguments.run_dir)
    configs = {method: quickstart_config(method, folder, arguments.epochs) for method in COMPRESSIONS}
    try:
        with process_group():  # one for all three runs
            runs = [_run(config) for config in configs.values()]
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    picture = folder / "quickstart.png"
    plot_runs({_title(config): Path(config.run_dir) for config in configs.values()}, picture)
    print(f"\n{summary_table(runs)}\n")
    print(f"Every run's config, metrics and summary: {folder}/{{{','.join(configs)}}}/")
    print(f"Validation BCE by step and by parameters: {picture}")
    print(f"Took {time.perf_counter() - started:.0f} s.")
    return 0


def quickstart_config(method: str, folder: Path, epochs: int) -> TrainConfig:
    """The defaults of training, evaluated twice an epoch for a smoother curve."""
    return TrainConfig(
        run_dir=str(folder / method),
        method=method,
        compression=COMPRESSIONS[method],
        epochs=epochs,
        validation_freq_within_epoch=35,
        overwrite=True,
    )


def _run(config: TrainConfig) -> Summary:
    logger.info("== %s ==", _title(config))
    return train(config)


def _title(config: TrainConfig) -> str:
    return config.method if config.compression == 1 else f"{config.method}, {config.compression:g}x"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlrm_example.quickstart", description=__doc__)
    parser.add_argument(
        "--run_dir", default="runs/quickstart", help="where everything is written (default: %(default)s)"
    )
    default_epochs = TrainConfig(run_dir="").epochs
    parser.add_argument("--epochs", type=int, default=default_epochs, help="of each run (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
