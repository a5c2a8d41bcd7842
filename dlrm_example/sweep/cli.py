"""The flags of a sweep, and the training config of each of its runs."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlrm_example.budget import plan_tables
from dlrm_example.cli import parse_config
from dlrm_example.config import TrainConfig, UsageError
from dlrm_example.data import DatasetInfo
from dlrm_example.sweep.grid import FULL, Case, expand

DECIDED = (
    "method",
    "compression",
    "seed",
    "resume",
    "overwrite",
)  # what a training may be told, and not by the user here


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs to make, and where; `flags` are those of `dlrm_example.train` that all runs share."""

    methods: tuple[str, ...]
    compressions: tuple[float, ...]
    seeds: int
    run_dir: str
    results: str | None
    truth: str | None
    jobs: int
    list: bool
    flags: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the first flag that cannot be."""
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be 1 or more")
        wrong = [size for size in self.compressions if not (size >= 1 and math.isfinite(size))]
        if wrong:
            raise UsageError(f"--compressions has {wrong[0]:g}; it must be 1 or more")
        for name in DECIDED:
            if any(flag == f"--{name}" or flag.startswith(f"--{name}=") for flag in self.flags):
                instead = next((f": give --{own}" for own in ("methods", "compressions", "seeds") if name in own), "")
                raise UsageError(f"--{name} is up to the sweep{instead}")
        if "RANK" in os.environ:
            raise UsageError("a sweep starts its own processes: start it without torchrun, or its runs by launch/")

    @property
    def prefix(self) -> Path:
        """Of the names of the files of results."""
        return Path(self.results or Path(self.run_dir) / "sweep")

    def runs(self) -> dict[Case, TrainConfig]:
        """In the order in which they are made.

        Raises:
            UsageError: a method or a flag of the training is unknown or cannot be.
        """
        cases = expand(self.methods, self.compressions, range(1, self.seeds + 1))
        return {case: self._config(case) for case in cases}

    def _config(self, case: Case) -> TrainConfig:
        shared = _without_options(self.flags) if case.method == FULL else self.flags
        return parse_config([*shared, *case.flags, "--run_dir", str(Path(self.run_dir) / case.name)])


def parse_sweep(argv: Sequence[str] | None = None) -> SweepConfig:
    """The config that the flags ask for; those that the sweep does not know are left for its trainings."""
    known, rest = _parser().parse_known_args(argv)
    return SweepConfig(**vars(known), flags=tuple(rest))


def leave_out_unfit(
    runs: Mapping[Case, TrainConfig], info: DatasetInfo
) -> tuple[dict[Case, TrainConfig], dict[str, str]]:
    """The runs whose method fits its budget, and why others do not.

    Raises:
        UsageError: none but full tables do.
    """
    fitting: dict[Case, TrainConfig] = {}
    unfit: dict[str, str] = {}
    for case, config in runs.items():
        try:
            plan_tables(info, config)
            fitting[case] = config
        except UsageError as error:
            unfit.setdefault(f"{case.method} {case.compression:g}x", str(error))
    if unfit and all(case.method == FULL for case in fitting):
        raise UsageError(f"no method fits at any of these compressions, for example {next(iter(unfit.values()))}")
    return fitting, unfit


def _without_options(flags: Sequence[str]) -> list[str]:
    """The flags but `--method_options`, which full tables have none of."""
    kept: list[str] = []
    is_option = False
    for flag in flags:
        is_option = flag.startswith("--method_options") or (is_option and not flag.startswith("--"))
        kept += [] if is_option else [flag]
    return kept


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _sizes(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4,16,64") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlrm_example.sweep",
        description="Train every method at every compression over several seeds, and full tables; then tabulate and draw.",
        epilog="Any other flag is one of python -m dlrm_example.train, for all runs alike. The same command again goes on "
        "with what was interrupted and makes what is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, default: object, help_text: str, **settings: object) -> None:
        parser.add_argument(f"--{name}", default=default, help=help_text, **settings)  # type: ignore[arg-type]

    add("methods", "cce,ce,hashing_trick,robe", "comma-separated; full tables are always among them", type=_names)
    add("compressions", "4,16,64,256", "comma-separated: full parameters / parameters", type=_sizes)
    add("seeds", 3, "how many: seeds 1, 2, ..", type=int)
    add("run_dir", "runs/sweep", "each run has a folder in this one, by its name")
    results_help = "how the names of the results begin, without .csv, .md, _val.png, _test.png; else RUN_DIR/sweep"
    add("results", None, results_help)
    add("truth", None, "truth.json of generated logs, whose least possible loss is then drawn too")
    add("jobs", 1, "runs at a time", type=int)
    list_help = "print the runs, as launch/components.py:sweep reads them, and make none"
    parser.add_argument("--list", action="store_true", help=list_help)
    return parser
