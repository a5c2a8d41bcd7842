"""Sweep: `python -m dlrm_example.sweep --methods cce,ce --compressions 4,16 --seeds 3 --adagrad`.

The steps: grid -> leave out what does not fit -> make what is missing, a process a run -> table, page and pictures.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dlrm_example.commands import exit_code
from dlrm_example.config import UsageError
from dlrm_example.console import set_up_logging
from dlrm_example.records import read_json
from dlrm_example.stop import StoppedError
from dlrm_example.sweep.cli import SweepConfig, leave_out_unfit, parse_sweep
from dlrm_example.sweep.page import Report
from dlrm_example.sweep.runs import run_missing
from dlrm_example.train import open_dataset

logger = logging.getLogger("dlrm_example.sweep")  # under `python -m`, __name__ is "__main__"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where runs failed; else as :func:`exit_code`."""
    failures: dict[str, str] = {}
    code = exit_code(lambda: failures.update(sweep(parse_sweep(argv))), again="when the same command is given again")
    return code or int(bool(failures))


def sweep(config: SweepConfig) -> dict[str, str]:
    """Why runs failed, by name; the results that there are are written even where the sweep is stopped."""
    if not config.list:
        set_up_logging()
    runs = config.runs()
    info = open_dataset(next(iter(runs.values()))).info  # fetched once, before several runs need it
    floors = read_floors(config.truth)
    runs, unfit = leave_out_unfit(runs, info)
    if config.list:
        print("\n".join(f"{case.name}: {shlex.join(case.flags)}" for case in runs))
        return {}
    for reason in unfit.values():
        logger.info("left out: %s", reason)
    report = Report(runs=runs, unfit=unfit, info=info, floors=floors)
    try:
        failures = run_missing(list(runs.values()), config.jobs)
    except (StoppedError, KeyboardInterrupt):
        report.write(config.prefix)
        raise
    logger.info("results: %s", ", ".join(map(str, report.write(config.prefix))))
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return failures


def read_floors(truth: str | None) -> dict[str, float]:
    """The least BCE that a model can expect, by split, as `dlrm_example.data.generate` wrote it down.

    Raises:
        UsageError: the file does not say.
    """
    if truth is None:
        return {}
    try:
        return {split: found["bayes_log_loss"] for split, found in read_json(Path(truth))["splits"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--truth {truth} is no truth.json of dlrm_example.data.generate: {error!r}") from error


if __name__ == "__main__":
    sys.exit(main())
