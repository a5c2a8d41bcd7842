"""Every setting of a preparation in one frozen `PrepareConfig`, and its flags."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dlrm_example.config import UsageError
from dlrm_example.data.encoding import DENSE_TRANSFORMS
from dlrm_example.data.splits import TIME_UNITS

FORMATS = ("parquet", "criteo_kaggle", "criteo_1t", "criteo_npy")
SPLIT_RULES = ("fraction", "time", "last_day")
MLPERF_RANGE = 40_000_000


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to make of which rows; `--help` says what each field means."""

    input: tuple[str, ...]
    out: str
    format: Literal["parquet", "criteo_kaggle", "criteo_1t", "criteo_npy"] = "parquet"
    label_column: str | None = None
    dense_columns: tuple[str, ...] = ()
    sparse_columns: tuple[str, ...] = ()
    dense_transform: Literal["none", "log1p"] | None = None
    min_count: int = 1
    hash_buckets: Mapping[str, int] = field(default_factory=dict)
    max_ind_range: int | None = None
    split: Literal["fraction", "time", "last_day"] | None = None
    time_column: str | None = None
    time_unit: str = "seconds"
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    max_bad_lines: int = 0
    seed: int = 1
    workers: int = min(os.cpu_count() or 1, 8)
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the first flag whose value cannot be."""
        for name, known in (("format", FORMATS), ("split", SPLIT_RULES), ("dense_transform", DENSE_TRANSFORMS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UsageError(f"--{name} {value!r} is unknown; there are {', '.join(known)}")
        if self.time_unit not in TIME_UNITS:
            raise UsageError(f"--time_unit {self.time_unit!r} is unknown; there are {', '.join(TIME_UNITS)}")
        if self.format == "parquet":
            self._check_parquet()
        else:
            self._check_criteo()
        for name, least in (("min_count", 1), ("workers", 1), ("max_bad_lines", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be {least} or more")
        if self.max_ind_range is not None and self.max_ind_range < 1:
            raise UsageError(
                f"--max_ind_range is {self.max_ind_range}; it must be above 0 ({MLPERF_RANGE} is MLPerf's)"
            )
        for name, buckets in self.hash_buckets.items():
            if not 2 <= buckets < 2**31:
                raise UsageError(f"--hash_buckets {name}={buckets} must be at least 2 and below 2^31")
        if not (self.val_fraction > 0 and self.test_fraction > 0 and self.val_fraction + self.test_fraction < 1):
            fractions = f"{self.val_fraction} and --test_fraction {self.test_fraction}"
            raise UsageError(f"--val_fraction {fractions} must be above 0 and leave rows for training")

    def _check_parquet(self) -> None:
        for name in ("label_column", "dense_columns", "sparse_columns"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is needed: the model has a label, dense and sparse features")
        columns = [self.label_column, *self.dense_columns, *self.sparse_columns]
        twice = sorted({str(name) for name in columns if columns.count(name) > 1})
        if twice:
            raise UsageError(f"columns {', '.join(twice)} are given twice among label, dense and sparse ones")
        wants_time = self.split in ("time", "last_day")
        if wants_time and self.time_column is None:
            raise UsageError(f"--split {self.split} needs --time_column")
        if not wants_time and self.time_column is not None:
            raise UsageError("--time_column is given, so say whether --split time or --split last_day")
        unknown = sorted(self.hash_buckets.keys() - {*self.sparse_columns, ALL})
        if unknown:
            raise UsageError(f"--hash_buckets names {', '.join(unknown)}, which are not among --sparse_columns")

    def _check_criteo(self) -> None:
        for name in ("label_column", "dense_columns", "sparse_columns", "split", "time_column"):
            if getattr(self, name):
                raise UsageError(f"--{name} is fixed by --format {self.format}")

    def buckets_of(self, column: str) -> int | None:
        """How many ids a column is hashed into; None where it gets a vocabulary."""
        return self.hash_buckets.get(column, self.hash_buckets.get(ALL))


ALL = "all"  # in --hash_buckets


def parse_prepare_config(argv: Sequence[str] | None = None) -> PrepareConfig:
    """The config that the flags ask for."""
    return PrepareConfig(**vars(_parser().parse_args(argv)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _buckets(text: str) -> dict[str, int]:
    try:
        if "=" not in text:
            return {ALL: int(text)}
        pairs = [pair.partition("=") for pair in text.split(",")]
        return {name: int(number) for name, _, number in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor COLUMN=N,COLUMN=N") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlrm_example.data.prepare",
        description="Turn click logs into Parquet files with contiguous ids that dlrm_example.train reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    defaults = PrepareConfig.__dataclass_fields__

    def add(name: str, help_text: str, **settings: object) -> None:
        default = {} if name == "hash_buckets" else defaults[name].default
        parser.add_argument(f"--{name}", **{"help": help_text, "default": default, **settings})  # type: ignore[arg-type]

    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders or globs; key=value folders are columns"
    )
    parser.add_argument("--out", required=True, help="folder to make; it appears when it is complete")
    add("format", f"one of {', '.join(FORMATS)}; criteo_npy reads the day_N_*.npy of torchrec_dlrm's scripts")
    add("label_column", "0/1 or boolean")
    add("dense_columns", "comma-separated", type=_names)
    add("sparse_columns", "comma-separated; list columns become multi-hot", type=_names)
    transform_help = "none or log1p, ln(1 + max(x, 0)) (without it: log1p for Criteo's text, else none); nulls become 0"
    add("dense_transform", transform_help)
    add("min_count", "values that occur less often in the training rows share one id", type=int)
    buckets_help = "N, or COLUMN=N,COLUMN=N: hash into N ids instead of building a vocabulary"
    add("hash_buckets", buckets_help, type=_buckets)
    range_help = f"take integer ids modulo this before anything else; MLPerf's cap is {MLPERF_RANGE}"
    add("max_ind_range", range_help, type=int)
    add(
        "split",
        "fraction (of rows, at random; what happens without it), time (the last rows) or last_day (half and half)",
    )
    add("time_column", "integers, dates or timestamps, for --split time and last_day")
    add("time_unit", f"of an integer time column: one of {', '.join(TIME_UNITS)}")
    add("val_fraction", "for --split fraction and time", type=float)
    add("test_fraction", "for --split fraction and time", type=float)
    add("max_bad_lines", "how many malformed lines, or rows without a label of 0 or 1, may be left out", type=int)
    add("seed", "of --split fraction", type=int)
    add("workers", "threads", type=int)
    add("overwrite", "replace what is in --out", action="store_true")
    return parser
