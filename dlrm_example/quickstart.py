"""Three short runs on real data: full tables, and two methods with eight times fewer parameters (`make quickstart`)."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dlrm_example.commands import exit_code
from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.distributed import process_group
from dlrm_example.plots import plot_runs
from dlrm_example.recipe import SETTINGS, movielens_config
from dlrm_example.records import Summary
from dlrm_example.report import summary_table
from dlrm_example.train import train

logger = logging.getLogger("dlrm_example.quickstart")  # under `python -m`, __name__ is "__main__"

METHODS = ("full", "hashing_trick", "cce")
EVALUATE_EVERY = 35  # steps, of 70 an epoch


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    set_up_logging()
    return exit_code(lambda: _quickstart(Path(arguments.run_dir), arguments.epochs))


def _quickstart(folder: Path, epochs: int) -> None:
    started = time.perf_counter()
    configs = [
        movielens_config(method, str(folder / method), epochs=epochs, validation_freq_within_epoch=EVALUATE_EVERY)
        for method in METHODS
    ]
    with process_group():  # one for all three runs
        runs = [_run(config) for config in configs]
    picture = folder / "quickstart.png"
    plot_runs({_title(config): Path(config.run_dir) for config in configs}, picture)
    print(f"\n{summary_table(runs)}\n")
    print(f"Every run's config, metrics and summary: {folder}/{{{','.join(METHODS)}}}/")
    print(f"Validation BCE by step and by parameters: {picture}")
    print(f"Took {time.perf_counter() - started:.0f} s.")


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
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"], help="of each run (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
