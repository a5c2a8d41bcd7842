"""The picture of several runs: validation BCE by step, and the best of it against the number of parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlrm_example.records import Summary, read_metrics, read_summary, replace_atomically


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
