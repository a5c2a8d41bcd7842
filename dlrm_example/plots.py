"""Pictures of several runs: validation BCE by step, and the best of it against the number of parameters."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlrm_example.records import Summary, read_metrics, read_summary, replace_atomically

Curve = Sequence[tuple[int, Sequence[float]]]  # a number of parameters, and the scores of each seed


def plot_runs(run_dirs: Mapping[str, Path], target: Path) -> None:
    """Draw the finished runs, by title, into a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_params = figure.subplots(1, 2)
    highest_start = 0.0
    for index, (title, folder) in enumerate(run_dirs.items()):
        color = f"C{index}"
        highest_start = max(highest_start, _draw_curve(by_step, title, read_metrics(folder), color))
        _draw_point(by_params, title, read_summary(folder), color)
    by_step.set_ylim(top=highest_start * 1.05)  # a curve that leaves through the top overfits
    by_step.set(xlabel="step", ylabel="validation BCE", title="dotted: re-clustering")
    by_params.set(
        xlabel="embedding parameters", ylabel="best validation BCE", xscale="log", title="lower left is better"
    )
    for axes in (by_step, by_params):
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, target)


def plot_bands(panels: Mapping[str, Mapping[str, Curve]], target: Path, score: str) -> None:
    """Draw scores against parameters into a PNG: means over seeds, and a band of a standard deviation on either side.

    Args:
        panels: curves by name, by the title of their panel. One of a single size becomes a level, for comparison.
        target: the file.
        score: its name.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            _draw_band(axes, name, curve, f"C{index}")
        axes.set(xlabel="embedding parameters", ylabel=score, xscale="log", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, target)


def _draw_band(axes: Axes, name: str, curve: Curve, color: str) -> None:
    points = sorted(curve)
    params = [point for point, _ in points]
    means = [statistics.mean(scores) for _, scores in points]
    spreads = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in points]
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    if len(points) == 1:
        axes.axhline(means[0], label=name, color="black", linestyle="--")
        axes.axhspan(low[0], high[0], color="black", alpha=0.08)
        return
    axes.plot(params, means, marker="o", label=name, color=color)
    axes.fill_between(params, low, high, color=color, alpha=0.12)


def _save(figure: Figure, target: Path) -> None:
    with replace_atomically(target) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_curve(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], color: str) -> float:
    """Draw one run; its first validation BCE."""
    evaluations = [row for row in rows if row["event"] == "eval" and row["split"] == "val"]
    axes.plot([row["step"] for row in evaluations], [row["bce"] for row in evaluations], label=title, color=color)
    for row in rows:
        if row["event"] == "recluster":
            axes.axvline(row["step"], color=color, linestyle=":", linewidth=1)
    return float(evaluations[0]["bce"])


def _draw_point(axes: Axes, title: str, run: Summary, color: str) -> None:
    axes.scatter([run.embedding_params], [run.best_val_bce], label=title, color=color, s=60)
