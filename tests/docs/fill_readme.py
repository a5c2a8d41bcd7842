"""Put recorded results into the README again, without training anything.

    python -m tests.docs.fill_readme                            what docs/results has
    python -m tests.docs.fill_readme --quickstart runs/quickstart    record those runs of `make quickstart` first

The tables are made by the benchmark's and the example's own functions, from `docs/results/movielens_8x.json` and
`docs/results/quickstart.json`.
"""

import json
import sys
from pathlib import Path

from dlrm_example.quickstart import METHODS
from dlrm_example.records import Summary
from dlrm_example.report import summary_table
from tests.scripts import ROOT, load_benchmark

RESULTS = ROOT / "docs" / "results" / "movielens_8x.json"
QUICKSTART = ROOT / "docs" / "results" / "quickstart.json"
SHOWN = 110  # characters a line, up to the test AUROC


def record_quickstart(folder: Path) -> None:
    """Keep the summaries of a quickstart."""
    runs = [json.loads((folder / method / "summary.json").read_text()) for method in METHODS]
    QUICKSTART.write_text(json.dumps({"command": "make quickstart", "runs": runs}, indent=1) + "\n")


def quickstart_table() -> str:
    """What a quickstart prints, without what depends on the machine."""
    runs = [Summary(**run) for run in json.loads(QUICKSTART.read_text())["runs"]]
    return "\n".join(line[:SHOWN].rstrip() for line in summary_table(runs).splitlines())


def fill(readme: Path) -> None:
    """Replace what is between the markers."""
    text = readme.read_text()
    before, rest = text.split("<!-- quickstart:start -->\n")
    _, after = rest.split("<!-- quickstart:end -->")
    block = f"<!-- quickstart:start -->\n```text\n{quickstart_table()}\n```\n<!-- quickstart:end -->"
    readme.write_text(before + block + after)
    benchmark = load_benchmark("movielens_8x")
    runs = [Summary(**run) for run in json.loads(RESULTS.read_text())["runs"]]
    benchmark.replace_in_readme(readme, benchmark.markdown_table(runs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--quickstart"]:
        record_quickstart(Path(sys.argv[2]))
    fill(ROOT / "README.md")
    sys.exit(0)
