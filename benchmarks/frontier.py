"""The scores of several sweeps over the same data in one picture and one table, by parameters and by all bytes.

    python -m benchmarks.frontier

Reads the sweeps with a million ids a table from docs/results and writes frontier.md and frontier.png beside them; nothing is
trained.
"""

import csv
from collections.abc import Sequence

from benchmarks.harness import RESULTS
from dlrm_example.curves import Measured
from dlrm_example.plots import Panel, draw_panels, save
from dlrm_example.report import markdown_table
from dlrm_example.sweep.grid import FULL
from dlrm_example.sweep.results import SIZES

LEAST = 0.4694  # test BCE of the probabilities that the data were drawn with: sweep_million.md
# Where the points of each curve are: files, and the method there.
CURVES: dict[str, tuple[tuple[str, ...], str]] = {
    "CCE": (("sweep_million",), "cce"),
    "CCE, 32 hot ids": (("sweep_million_hot",), "cce"),
    "CCE, 32 hot ids, one column of 220 rows": (("sweep_million_bytes",), "cce"),
    "CCE, 32 hot ids, 5,000 ids assigned": (("sweep_million_warm",), "cce"),
    "CCE, 32 hot ids, 1,000 ids assigned": (("sweep_million_warm_1000",), "cce"),
    "ROBE": (("sweep_million", "sweep_million_robe"), "robe"),
    "CE": (("sweep_million",), "ce"),
    "DHE": (("sweep_million",), "dhe"),
    "hashing trick": (("sweep_million",), "hashing_trick"),
}
SCORE = "test_bce"


def points(files: Sequence[str], method: str, size: str) -> list[Measured]:
    """The scores of all seeds at each size, the smallest size first."""
    found: dict[float, list[float]] = {}
    for file in files:
        with (RESULTS / f"{file}.csv").open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["method"] == method:
                    found.setdefault(float(row[size]), []).append(float(row[SCORE]))
    return [Measured(at, scores) for at, scores in sorted(found.items())]


def full_tables() -> Measured:
    """The scores of full tables, a seed each."""
    (measured,) = points(["sweep_million"], FULL, "embedding_params")
    return measured


def table(level: Measured) -> str:
    """A row a point, those of the fewest bytes first."""
    rows = []
    for name, (files, method) in CURVES.items():
        by_params, by_bytes = (points(files, method, size) for size in SIZES)
        for params, stored in zip(by_params, by_bytes, strict=True):
            excess = (stored.mean - LEAST) / (level.mean - LEAST) - 1
            score = f"{stored.mean:.4f} ± {stored.spread:.4f}"
            cells = [
                name,
                f"{params.size:,.0f}",
                f"{stored.size:,.0f}",
                score,
                f"{excess:+.1%}",
                str(len(stored.scores)),
            ]
            rows.append((stored.size, cells))
    header = ["method", "params", "bytes in all", "test BCE", "excess above full's", "seeds"]
    return markdown_table(header, [cells for _, cells in sorted(rows)])


def page(level: Measured) -> str:
    """The results for people."""
    return f"""# Scores by size with a million ids a table, all in one

![Test BCE by parameters and by all bytes](frontier.png)

Three tables of a million ids; full tables have 48,000,000 parameters, 192,000,000 bytes, and a test BCE of {level.mean:.4f} ±
{level.spread:.4f} over {len(level.scores)} seeds. Excess is BCE above {LEAST}, the least that is possible. Mean ± standard
deviation over seeds. Bands and lines are those of [sweep_million.md](sweep_million.md), which says how the runs were made, as
do [sweep_million_hot.md](sweep_million_hot.md), [sweep_million_bytes.md](sweep_million_bytes.md),
[sweep_million_warm.md](sweep_million_warm.md), [sweep_million_warm_1000.md](sweep_million_warm_1000.md) and
[sweep_million_robe.md](sweep_million_robe.md).

{table(level)}

Made by `python -m benchmarks.frontier` from the `.csv` files of those pages.
"""


def main() -> None:
    """Draw and write."""
    level = full_tables()
    panels = [
        Panel(
            curves={name: points(files, method, size) for name, (files, method) in CURVES.items()},
            level=level,
            size=label,
            score="test BCE",
            stars=True,
        )
        for size, label in SIZES.items()
    ]
    save(draw_panels([panels]), RESULTS / "frontier.png")
    (RESULTS / "frontier.md").write_text(page(level))
    print(page(level))


if __name__ == "__main__":
    main()
