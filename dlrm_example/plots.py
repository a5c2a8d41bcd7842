"""Pictures of several runs: validation BCE by step, and scores against size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlrm_example.curves import Curve, Measured, first_crossing
from dlrm_example.records import Summary, read_metrics, read_summary, replace_atomically

DPI = 80  # pictures lie in the repository
COLORS = 10  # of matplotlib's cycle; then lines are dotted


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Scores against size, a curve a method: the means over seeds, in a band of a standard deviation on either side.

    `level` is the full table's score, for comparison, and `floor` one that no model can be below. A star marks where a
    curve is first at or below the level, where that is asked for.
    """

    curves: Mapping[str, Curve]
    size: str
    score: str
    title: str = ""
    level: Measured | None = None
    floor: float | None = None
    stars: bool = False


def plot_runs(run_dirs: Mapping[str, Path], target: Path) -> None:
    """Draw the finished runs, by title, into a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_params = figure.subplots(1, 2)
    highest_start = 0.0
    for index, (title, folder) in enumerate(run_dirs.items()):
        color = f"C{index}"
        highest_start = max(highest_start, _draw_run(by_step, title, read_metrics(folder), color))
        _draw_point(by_params, title, read_summary(folder), color)
    by_step.set_ylim(top=highest_start * 1.05)  # a curve that leaves through the top overfits
    by_step.set(xlabel="step", ylabel="validation BCE", title="dotted: re-clustering")
    by_params.set(
        xlabel="embedding parameters", ylabel="best validation BCE", xscale="log", title="lower left is better"
    )
    for axes in (by_step, by_params):
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, target)


def draw_panels(rows: Sequence[Sequence[Panel]]) -> Figure:
    """Rows of panels as long as the first; those of a row share their scores' axis. A method looks the same in all."""
    figure = Figure(figsize=(2 + 5 * len(rows[0]), 0.6 + 4 * len(rows)), layout="constrained")
    names = dict.fromkeys(name for row in rows for panel in row for name in panel.curves)
    styles = {name: _style(index) for index, name in enumerate(names)}
    all_axes = figure.subplots(len(rows), len(rows[0]), sharey="row", squeeze=False)
    for row, row_axes in zip(rows, all_axes, strict=True):
        for panel, axes in zip(row, row_axes, strict=True):
            _draw_panel(axes, panel, styles)
        row_axes[0].set_ylabel(row[0].score)
    entries = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for each in entries for handle, label in each}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def _style(index: int) -> dict[str, Any]:
    return {"color": f"C{index % COLORS}", "linestyle": "-" if index < COLORS else ":"}


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, curve in panel.curves.items():
        _draw_curve(axes, name, curve, styles[name])
        crossing = first_crossing(curve, panel.level.mean) if panel.stars and panel.level else None
        if crossing:
            axes.plot(crossing.at.size, crossing.at.mean, "*", color=styles[name]["color"], markersize=14)
    if panel.level:
        mean, spread = panel.level.mean, panel.level.spread
        axes.axhline(mean, label="full", color="black", linestyle="--")
        axes.axhspan(mean - spread, mean + spread, color="black", alpha=0.08)
    if panel.floor is not None:
        axes.axhline(panel.floor, label="best possible", color="grey", linestyle=":")
    axes.set(xscale="log", xlabel=panel.size, title=panel.title)
    axes.tick_params(axis="x", which="both", labelrotation=30, labelsize="small")  # less than a decade has many labels
    axes.grid(alpha=0.3)


def _draw_curve(axes: Axes, name: str, curve: Curve, style: Mapping[str, Any]) -> None:
    points = sorted(curve, key=lambda point: point.size)
    sizes, means = [point.size for point in points], [point.mean for point in points]
    low, high = [point.mean - point.spread for point in points], [point.mean + point.spread for point in points]
    axes.plot(sizes, means, marker=".", label=name, **style)
    axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15)


def save(figure: Figure, target: Path) -> None:
    """A PNG."""
    with replace_atomically(target) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def _draw_run(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], color: str) -> float:
    """Draw one run; its first validation BCE."""
    evaluations = [row for row in rows if row["event"] == "eval" and row["split"] == "val"]
    axes.plot([row["step"] for row in evaluations], [row["bce"] for row in evaluations], label=title, color=color)
    for row in rows:
        if row["event"] == "recluster":
            axes.axvline(row["step"], color=color, linestyle=":", linewidth=1)
    return float(evaluations[0]["bce"])


def _draw_point(axes: Axes, title: str, run: Summary, color: str) -> None:
    axes.scatter([run.embedding_params], [run.best_val_bce], label=title, color=color, s=60)
