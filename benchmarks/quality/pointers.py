"""Which bytes are worth having: BCE against all bytes, over rows, columns, bits and the part of ids with assignments.

Runs are made with an integer an assignment; as bits, results are the same, number by number, and only bytes differ.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from benchmarks.quality import plans
from benchmarks.quality.gmf import Settings
from benchmarks.quality.store import POINTERS, Record, found, publish
from dlrm_example.report import markdown_table

COLUMNS = (4, 8, 16)
WARM_PARTS = (None, 0.5, 0.25, 0.1)
PARAMS = {"ml-100k": (4_096, 16_384, 65_536), "gowalla": (32_768, 65_536, 131_072, 262_144)}


def grid(dataset: str, params: Iterable[int], seeds: Iterable[int]) -> list[Settings]:
    """The runs, seed by seed, the usual number of columns first."""
    sizes = [(num_columns, part) for num_columns in sorted(COLUMNS, key=lambda c: c != 8) for part in WARM_PARTS]
    return [
        settings(dataset, budget, num_columns, part, seed)
        for seed in seeds
        for num_columns, part in sizes
        for budget in params
    ]


def settings(dataset: str, params: int, num_columns: int, warm_part: float | None, seed: int) -> Settings:
    return Settings(
        **plans.LEVER_BASE,
        dataset=dataset,
        split="tune",
        params=params,
        seed=seed,
        epochs=plans.EPOCHS[dataset],
        options={"num_columns": num_columns},
        id_weights="counts",
        warm_part=warm_part,
    )


def is_of_grid(run: Record) -> bool:
    """Whether it was made for this page."""
    made = Settings(**run["settings"])
    if made.dataset not in PARAMS or made.params is None or set(made.options) != {"num_columns"}:
        return False
    return made == settings(made.dataset, made.params, made.options["num_columns"], made.warm_part, made.seed)


class Cell(NamedTuple):
    """One storage of one size."""

    num_columns: int
    warm_part: float | None
    is_packed: bool
    params: int
    num_bytes: int
    bce: float
    seeds: int


def cells(runs: Sequence[Record], dataset: str) -> list[Cell]:
    """All there are, the fewest bytes first."""
    result = []
    for params in PARAMS[dataset]:
        for num_columns in COLUMNS:
            for part in WARM_PARTS:
                mine = found(runs, lambda seed: settings(dataset, params, num_columns, part, seed))  # noqa: B023
                if mine:
                    bce = statistics.mean(run["best_bce"] for run in mine)
                    for is_packed, name in ((False, "total_bytes"), (True, "packed_bytes")):
                        result.append(Cell(num_columns, part, is_packed, params, mine[0][name], bce, len(mine)))
    return sorted(result, key=lambda cell: (cell.num_bytes, cell.bce))


def frontier(everything: Sequence[Cell]) -> list[Cell]:
    """Those than which none is better in as many bytes."""
    best: list[Cell] = []
    for cell in everything:
        if not best or cell.bce < best[-1].bce:
            best.append(cell)
    return best


def draw(everything: Sequence[Cell], title: str) -> Figure:
    """A line for each number of columns and part of ids, over the budgets; the best of all are circled."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(WARM_PARTS, "os^v", strict=True))
    for index, num_columns in enumerate(COLUMNS):
        for part, marker in markers.items():
            for is_packed in (False, True):
                mine = [c for c in everything if c[:3] == (num_columns, part, is_packed)]
                style: dict[str, Any] = {"color": f"C{index}", "marker": marker, "linestyle": "-" if is_packed else ":"}
                label = f"c={num_columns}, {_part(part)} of the ids" if is_packed and mine else None
                axes.plot([c.num_bytes for c in mine], [c.bce for c in mine], label=label, alpha=0.7, **style)
    best = frontier(everything)
    axes.scatter([c.num_bytes for c in best], [c.bce for c in best], s=150, facecolors="none", edgecolors="black")
    axes.set(xscale="log", xlabel="bytes, assignments counted (solid: bit-packed)", ylabel="best BCE", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _part(part: float | None) -> str:
    return "all" if part is None else f"{part:g}"


def _row(cell: Cell) -> list[str]:
    storage = "bits" if cell.is_packed else "integers"
    return [
        f"{cell.num_bytes:,}",
        f"{cell.params:,}",
        str(cell.num_columns),
        _part(cell.warm_part),
        storage,
        f"{cell.bce:.4f}",
        str(cell.seeds),
    ]


HEADER = ("bytes in all", "params", "columns", "ids with assignments", "stored as", "best BCE", "seeds")


def write_page(runs: Sequence[Record], titles: dict[str, str]) -> None:
    """``pointers.{json,md}`` and a plot a data set."""
    sections = []
    for dataset, title in titles.items():
        everything = cells(runs, dataset)
        if everything:
            plot = f"pointers_{dataset.replace('-', '_')}.png"
            draw(everything, title).savefig(RESULTS / plot, dpi=80)
            best = markdown_table(HEADER, [_row(cell) for cell in frontier(everything)])
            table = markdown_table(HEADER, [_row(cell) for cell in everything])
            sections.append(
                f"## {title}\n\n![BCE against bytes]({plot})\n\nNone is better in as many bytes:\n\n{best}\n\nAll:\n\n{table}"
            )
    if sections:
        publish(list(runs), POINTERS)
        facts = {f"{r['made_by']['commit']} on {r['made_by']['hardware']}, torch {r['made_by']['torch']}" for r in runs}
        made_by = "\n".join(f"* {fact}" for fact in sorted(facts))
        (RESULTS / "pointers.md").write_text(PAGE.format(sections="\n\n".join(sections), made_by=made_by))


PAGE = """# Which bytes are worth having?

CCE, with everything that is stored counted: codebooks, assignments, warm ids. The protocol is that of
[quality.md](quality.md), on its split for tuning, with gradient steps of 1, as for its levers; ids weigh their counts in
re-clusterings. Of the ids of each table, a part has stored assignments (`num_assigned_ids`), the ones seen most often; the
others share a row of each main codebook from the first re-clustering on, before which ids are hashed, and blocks where all
have assignments. "Bits" are `bit_packed=True`, which gives the same vectors, bit by bit, so it is not run again. Sizes that
are missing were not run, and one seed says little about differences below 0.003.

{sections}

## Again

```bash
python -m benchmarks.quality pointers --dataset gowalla --gowalla gowalla.zip --seeds 1 --jobs 2
python -m benchmarks.quality pointers --dataset ml-100k --jobs 2
python -m benchmarks.quality page
```

The last line writes this page from [`pointers.json`](pointers.json) and new runs. Made by commit

{made_by}
"""
