"""What finished runs come to: the records they left, as they are (`.csv`), and scores by size as curves."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm_example.config import TrainConfig
from dlrm_example.curves import Curve, Measured
from dlrm_example.plots import Panel
from dlrm_example.records import CONFIG, SUMMARY, read_json, replace_atomically
from dlrm_example.sweep.grid import FULL, Case
from dlrm_example.sweep.runs import is_finished

SIZES = {"embedding_params": "embedding parameters", "embedding_bytes": "bytes in all, assignments counted"}
SPLITS = {"val": ("best_val_bce", "best_val_auroc"), "test": ("test_bce", "test_auroc")}

Budget = tuple[str, float]  # method and compression


@dataclass(frozen=True)
class Results:
    """The summaries of finished runs, which may have more in them than this looks at."""

    summaries: Mapping[Case, Mapping[str, Any]]
    made_by: Mapping[Case, Mapping[str, Any]]

    def by_budget(self) -> dict[Budget, list[Mapping[str, Any]]]:
        """One summary a seed; full tables first, methods as they were given, the largest size first."""
        found: dict[Budget, list[Mapping[str, Any]]] = {}
        for case, summary in self.summaries.items():
            found.setdefault((case.method, case.compression), []).append(summary)
        return found

    def curves(self, size: str, score: str) -> dict[str, Curve]:
        """By method, full tables left out."""
        curves: dict[str, list[Measured]] = {}
        for (method, _), found in self.by_budget().items():
            if method != FULL:
                curves.setdefault(method, []).append(Measured(found[0][size], [run[score] for run in found]))
        return dict(curves)

    def level(self, size: str, score: str) -> Measured | None:
        """Full tables', if there are any yet."""
        found = self.by_budget().get((FULL, 1.0))
        return Measured(found[0][size], [run[score] for run in found]) if found else None

    def panels(self, split: str, floor: float | None) -> list[list[Panel]]:
        """BCE, then AUROC, each against both sizes."""
        bce, auroc = SPLITS[split]
        title = {"val": "validation", "test": "test"}[split]
        rows = ((bce, f"{title} BCE", floor, True), (auroc, f"{title} AUROC", None, False))
        return [
            [
                Panel(
                    curves=self.curves(size, score),
                    level=self.level(size, score),
                    size=label,
                    score=name,
                    floor=least,
                    stars=stars,
                )
                for size, label in SIZES.items()
            ]
            for score, name, least, stars in rows
        ]


def read_results(runs: Mapping[Case, TrainConfig]) -> Results:
    """Of those that are finished."""
    folders = {case: Path(config.run_dir) for case, config in runs.items() if is_finished(config)}
    return Results(
        {case: read_json(folder / SUMMARY) for case, folder in folders.items()},
        {case: made_by(folder) for case, folder in folders.items()},
    )


def made_by(folder: Path) -> dict[str, Any]:
    """The commit, hardware and versions that made a run."""
    config = read_json(folder / CONFIG)
    return {name: config.get(name, "unknown") for name in ("commit", "hardware")} | config.get("versions", {})


def write_csv(results: Results, target: Path) -> None:
    """A line a run: what its `summary.json` says, exactly."""
    columns = list(dict.fromkeys(name for summary in results.summaries.values() for name in summary))
    sources = list(dict.fromkeys(name for source in results.made_by.values() for name in source))
    with replace_atomically(target) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "asked_compression", *columns, *sources], lineterminator="\n")
        writer.writeheader()
        for case, summary in results.summaries.items():
            writer.writerow(
                {"run": case.name, "asked_compression": case.compression, **summary, **results.made_by[case]}
            )
