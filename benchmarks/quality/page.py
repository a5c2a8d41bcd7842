"""The page of results: tables and plots of finished runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from benchmarks.quality import plans
from benchmarks.quality.gmf import Settings
from benchmarks.quality.store import Record, found
from cce_torchrec import METHODS
from dlrm_example.curves import Curve, Measured, first_crossing, mean_and_spread
from dlrm_example.plots import Panel, draw_panels, save
from dlrm_example.report import markdown_table

TITLES = {"ml-100k": "MovieLens-100K", "gowalla": "Gowalla"}
SIZES = {"params": "params", "total_bytes": "bytes, assignments counted"}


@dataclass(frozen=True)
class Point:
    """The runs of one method, budget and data set, seed by seed."""

    method: str
    runs: list[Record]

    def mean(self, name: str) -> float:
        return statistics.mean(run[name] for run in self.runs)

    def difference(self, base: "Point") -> float:
        """Of the mean BCE from that of ``base``, over the seeds that both have."""
        mine, others = ({run["settings"]["seed"]: run["best_bce"] for run in point.runs} for point in (self, base))
        return statistics.mean(mine[seed] - others[seed] for seed in mine.keys() & others.keys())

    def text(self, name: str) -> str:
        """Mean ± standard deviation."""
        return mean_and_spread([run[name] for run in self.runs])


def points(runs: Sequence[Record], dataset: str) -> dict[str, list[Point]]:
    """What is reported of a data set, by method, smallest first."""
    result: dict[str, list[Point]] = {}
    for method in plans.METHOD_NAMES:
        for budget in [None] if method == plans.FULL else plans.BUDGETS[dataset]:
            mine = found(runs, lambda seed: plans.reported_settings(dataset, method, budget, seed))  # noqa: B023
            if mine:
                result.setdefault(method, []).append(Point(method, mine))
    return result


def write_page(runs: Sequence[Record]) -> None:
    """``quality.md`` and a plot a data set."""
    sections = []
    for dataset, title in TITLES.items():
        curves = points(runs, dataset)
        if plans.FULL not in curves:
            continue
        plot = f"quality_{dataset.replace('-', '_')}.png"
        save(draw(curves, title), RESULTS / plot)
        seeds = max(len(point.runs) for curve in curves.values() for point in curve)
        sections.append(
            f"## {title}\n\n![BCE against size]({plot})\n\n{_scores(curves)}\n\n{_matches(curves)}\n\n"
            f"Up to {plans.EPOCHS[dataset]} epochs, up to {seeds} seeds. {_unfit(runs, dataset)}"
        )
    (RESULTS / "quality.md").write_text(_page(sections, runs))


def _scores(curves: Mapping[str, Sequence[Point]]) -> str:
    header = ("method", "params", "bytes of params", "bytes in all", "best BCE", "best AUC", "seeds")
    rows = []
    for method, curve in curves.items():
        for point in curve:
            sizes = [f"{point.runs[0][name]:,}" for name in ("params", "codebook_bytes", "total_bytes")]
            rows.append([f"`{method}`", *sizes, point.text("best_bce"), point.text("best_auc"), str(len(point.runs))])
    return markdown_table(header, rows)


def _unfit(runs: Sequence[Record], dataset: str) -> str:
    """The budgets that are too small for a method."""
    settings = [run["settings"] for run in runs if "does_not_fit" in run]
    mine = [s for s in settings if s["dataset"] == dataset and s["split"] == "report"]
    names = sorted({f"`{s['method']}` at {s['params']:,}" for s in mine})
    return f"Too small for the method: {', '.join(names)}." if names else ""


def _matches(curves: Mapping[str, Sequence[Point]]) -> str:
    """The compression at which each method first matches the full table."""
    full = curves[plans.FULL][0]
    rows = []
    for method, curve in curves.items():
        if method == plans.FULL:
            continue
        found = [first_crossing(bce_by(size, curve), full.mean("best_bce")) for size in SIZES]
        ratios = [
            f"{full.mean(size) / match.at.size:.1f}x" if match else "-"
            for size, match in zip(SIZES, found, strict=True)
        ]
        rows.append([f"`{method}`", f"{found[0].at.size:,.0f}" if found[0] else "at no size tried", *ratios])
    title = f"The smallest size at which the mean BCE is at or below the full table's {full.mean('best_bce'):.4f}:"
    return f"{title}\n\n" + markdown_table(("method", "params", "fewer params", "fewer bytes in all"), rows)


def draw(curves: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """BCE against both sizes, of methods as they are; a star is the first match of the full table."""
    curves = {method: points for method, points in curves.items() if method in METHODS}
    panels = [
        Panel(
            curves={method: bce_by(size, points) for method, points in curves.items() if method != plans.FULL},
            level=bce_by(size, curves[plans.FULL])[0],
            size=label,
            score="best BCE",
            title=title,
            stars=True,
        )
        for size, label in SIZES.items()
    ]
    return draw_panels([panels])


def bce_by(size: str, points: Sequence[Point]) -> Curve:
    """As a curve over `size`."""
    return [Measured(point.mean(size), [run["best_bce"] for run in point.runs]) for point in points]


def _changes(
    runs: Sequence[Record], names: Sequence[str], settings_of: Callable[[str, str, int, int], Settings]
) -> str:
    """A table of BCE, a row a change; the difference from the first row and its seeds in brackets."""
    columns = [(dataset, budget) for dataset in TITLES for budget in plans.LEVER_BUDGETS[dataset]]
    bce: dict[tuple[str, tuple[str, int]], Point] = {}
    for name in names:
        for dataset, budget in columns:
            mine = found(runs, lambda seed: settings_of(dataset, name, budget, seed), plans.LEVER_SEEDS)  # noqa: B023
            if mine:
                bce[name, (dataset, budget)] = Point(name, mine)
    columns = [column for column in columns if any(key[1] == column for key in bce)]

    def cell(name: str, column: tuple[str, int]) -> str:
        if (name, column) not in bce:
            return ""
        point = bce[name, column]
        if name == names[0] or (names[0], column) not in bce:
            return point.text("best_bce")
        return f"{point.mean('best_bce'):.4f} ({point.difference(bce[names[0], column]):+.4f}, {len(point.runs)})"

    header = ["CCE with", *(f"{TITLES[dataset]}, {budget:,}" for dataset, budget in columns)]
    rows = [[name, *(cell(name, column) for column in columns)] for name in names]
    return markdown_table(header, [row for row in rows if any(row[1:])])


def _page(sections: Sequence[str], runs: Sequence[Record]) -> str:
    tuning = [run for run in runs if run["settings"]["split"] == "tune"]
    levers = _changes(tuning, list(plans.LEVERS), plans.lever_settings)
    trials = _changes(tuning, list(plans.TRIED), plans.trial_settings)
    facts = {
        f"{run['made_by']['commit']} on {run['made_by']['hardware']}, torch {run['made_by']['torch']}" for run in runs
    }
    made_by = "\n".join(f"* {fact}" for fact in sorted(facts))
    return PAGE.format(sections="\n\n".join(sections), levers=levers, trials=trials, made_by=made_by)


PAGE = """# How good are the methods at a size?

Matrix factorisation of clicks: P(click) = sigmoid(user vector . item vector), 32 dims, both tables in one compressed
collection. AdamW at 1e-3, batches of 4,096, the same initial size of vectors and the same number of epochs for all methods;
a run ends early when BCE and AUC are both worse than the best so far by a hundredth. Budgets count the embedding parameters
of both tables, half of them each, but a table never gets more than a full one has.

* MovieLens-100K: ratings of 3 are dropped, a rating of 4 or 5 is a click. The last two ratings of each user are held out.
* Gowalla: check-ins in a published split, and one item drawn evenly for each, where the user never was.

BCE (nats a click) and AUC are the best over epochs on what is held out, as in the protocol; mean ± standard deviation over
seeds. "pq" cuts down the trained full table at its best epoch; "pq_tuned" trains the result for up to as many epochs
again, so it has twice the training of the others. Both need the full table first. "bytes in all" adds assignments and hash
coefficients to the parameters.

{sections}

## One setting changed at a time

On another split (what is held out is cut from the training part), so that settings are not chosen on the numbers above. The
base is CCE with the settings from before this table: a gradient step of 1, damped by 1, else those of today. Best BCE, mean
over seeds; in brackets the difference from the base over the same seeds (negative is better) and how many these are. With one
seed, differences below about 0.003 say little; with ten, below 0.001.

{levers}

## Changes that are not settings

In the same way, against CCE as it is now; [trials.py](../../benchmarks/quality/trials.py) has them. None is better on both
data sets at all sizes, so none is in the library. "One iteration from the codebooks, 24 times" moves ids to other rows
between what would be re-clusterings, as straight-through gradients of assignments would.

{trials}

## Read with care

* Few steps. Thirty epochs of MovieLens-100K are 540 steps, six of Gowalla 2,376, at 1e-3: runs hardly overfit and mostly
  still improve at the end, full tables included. Whatever makes vectors move faster then looks better. Adam moves each row by
  about the learning rate, so a vector that is the sum of six rows moves up to six times as far as a single row. The rows with
  a learning rate of 0.003 show how much of a gain is this.
* "Full" depends on the initial size of the vectors more than on anything else that was tried. The standard deviation of 0.03
  was chosen on the other split, for all methods alike; methods whose vectors are products may want another.
* `cce` and `residual_cce` begin with blocks of consecutive ids ([recluster.md](../recluster.md#gradients)), so they make use
  of how ids are numbered, as `tt_rec` and `qr` do. On Gowalla that is most of what they gain: neighbours are alike there.
  "Hashes at the start" makes no use of it, [siblings.md](siblings.md) has the same with ids renumbered at random, and
  `hashing_trick_blocks` and `ce_blocks` are what their siblings gain by it.
* Re-clusterings follow the [gradients](../recluster.md#gradients) of the 100 steps before them, so a re-clustering is also a
  Newton step of the codebooks: vectors move faster, as in the first point. "Hashes at the start, no gradients" is the
  paper's algorithm.
* Product quantisation of the trained full table ("pq") loses almost nothing at these sizes: codebooks are large enough, and
  what matters is to find the assignments. "pq" trains the full table first, which is what the others avoid. The paper's claim
  that CCE from scratch is as good holds where the row of CCE is at or below that of "pq".
* "hot ids" in a name: a quarter of the rows are hot ids' own ([recluster.md](../recluster.md)). Ids are not numbered by
  frequency here, so hot ids are known from the first re-clustering on.
* `ce` has eight columns and `robe` blocks of 4 dims, as `from_budget` takes; names with a number have that many columns, or
  blocks that wide. Signs are the default of `hashed_net`. See [siblings.md](siblings.md).
* Levers that help on one data set only change no default. Blocks at the start help on both, and so do gradient steps of 2
  with a damping of 2, at every size: they became the default. Without more damping they gain more on Gowalla, less on
  MovieLens-100K at 65,536 parameters, and cost 0.0007 with a million ids (validation BCE of
  [sweep_million_warm.md](sweep_million_warm.md) at 1,024 times fewer parameters, three seeds, in a trial; with it there is no
  difference).
* Steps of 3 with a damping of 3 are as good as these, and were not tried with a million ids. Six levels with 12
  re-clusterings are better than the base at every size, with 2.5 times as many assignments an id.
* More levels are a method of their own, `residual_cce`. With three levels and four columns, its default, it stores as much
  for each id as `cce` with eight columns. It is better where codebooks are large (Gowalla from 32,768 parameters up) and on
  MovieLens-100K but for the largest size, worse on Gowalla where a codebook has fewer than a hundred rows. So `cce` keeps the
  two codebooks a column of the paper.
* More levels and more columns store more for each id: see the column "bytes in all".
* 16 columns of 32 dims are two numbers wide, which FBGEMM's fused kernels do not take; it runs in unsharded collections only.

## Again

```bash
python -m benchmarks.quality run --dataset ml-100k --jobs 2
python -m benchmarks.quality run --dataset gowalla --gowalla gowalla.zip --jobs 2
python -m benchmarks.quality levers --dataset ml-100k --jobs 2
python -m benchmarks.quality trials --dataset ml-100k --jobs 2
python -m benchmarks.quality page
```

The last line writes this page from [`quality.json`](quality.json) and new runs. Made by commit

{made_by}
"""
