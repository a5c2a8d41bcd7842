"""Put the recorded results of `benchmarks/movielens_8x.py` into the README again, without training anything.

    python -m tests.docs.fill_readme

The table is made by the benchmark's own functions from `docs/results/movielens_8x.json`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from dlrm_example.records import Summary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "movielens_8x.json"


def load_benchmark() -> ModuleType:
    """The benchmark as a module; it is a script, not part of a package."""
    spec = importlib.util.spec_from_file_location("movielens_8x", ROOT / "benchmarks" / "movielens_8x.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(readme: Path) -> None:
    """Replace what is between the markers."""
    benchmark = load_benchmark()
    runs = [Summary(**run) for run in json.loads(RESULTS.read_text())["runs"]]
    benchmark.replace_in_readme(readme, benchmark.markdown_table(runs))


if __name__ == "__main__":
    fill(ROOT / "README.md")
    sys.exit(0)
