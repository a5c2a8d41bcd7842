"""The runs of a sweep: every method at every compression over several seeds, and full tables to compare with."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

FULL = "full"


@dataclass(frozen=True)
class Case:
    """One run: which method, how many times fewer parameters are asked for, and which seed."""

    method: str
    compression: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, and of its part of a job on a cluster, where only a-z, 0-9 and - may be."""
        size = "" if self.method == FULL else f"-{_number(self.compression)}x"
        return re.sub(r"[^a-z0-9]+", "-", f"{self.method}{size}-seed{self.seed}")

    @property
    def flags(self) -> list[str]:
        """Those of `dlrm_example.train`."""
        return ["--method", self.method, "--compression", _number(self.compression), "--seed", str(self.seed)]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def expand(methods: Iterable[str], compressions: Iterable[float], seeds: Iterable[int]) -> list[Case]:
    """Seed by seed, so that every method has one run before any has two; full tables first."""
    others = list(dict.fromkeys(method for method in methods if method != FULL))
    sizes = list(dict.fromkeys(compressions))
    cases = [(FULL, 1.0), *((method, size) for method in others for size in sizes)]
    return [Case(*case, seed) for seed in seeds for case in cases]
