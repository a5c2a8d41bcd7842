"""The results of a sweep for people: a page of Markdown, and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm_example.checkpoints import settings_that_matter
from dlrm_example.config import TrainConfig
from dlrm_example.curves import first_crossing, mean_and_spread
from dlrm_example.data import DatasetInfo
from dlrm_example.data.manifest import column_file
from dlrm_example.plots import draw_panels, save
from dlrm_example.provenance import command
from dlrm_example.records import replace_atomically
from dlrm_example.report import markdown_table
from dlrm_example.sweep.grid import Case
from dlrm_example.sweep.results import SIZES, SPLITS, Budget, Results, read_results, write_csv


@dataclass(frozen=True, kw_only=True)
class Report:
    """What there is to tell of: runs, budgets too small for a method, the data, the least possible BCE by split."""

    runs: Mapping[Case, TrainConfig]
    unfit: Mapping[str, str]
    info: DatasetInfo
    floors: Mapping[str, float]

    def write(self, prefix: Path) -> list[Path]:
        """``PREFIX.csv``, ``PREFIX.md``, ``PREFIX_val.png`` and ``PREFIX_test.png`` of the runs that are finished."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        table, page = (prefix.with_name(f"{prefix.name}.{ending}") for ending in ("csv", "md"))
        results = read_results(self.runs)
        pictures = {split: prefix.with_name(f"{prefix.name}_{split}.png") for split in SPLITS}
        write_csv(results, table)
        for split, picture in pictures.items():
            save(draw_panels(results.panels(split, self.floors.get(split))), picture)
        with replace_atomically(page) as temporary:
            temporary.write_text(self._page(results, table.name, {name: path.name for name, path in pictures.items()}))
        return [table, page, *pictures.values()]

    def _page(self, results: Results, table: str, pictures: Mapping[str, str]) -> str:
        config = next(iter(self.runs.values()))
        data = Path(config.data_path).name if config.dataset_name == "parquet" else config.dataset_name  # type: ignore[arg-type]
        return PAGE.format(
            data=data,
            scores=scores_table(results),
            crossings="\n\n".join(crossings_table(results, split) for split in SPLITS),
            floors=self._floors(),
            missing=self._missing(results),
            tables=tables_table(self.info, config),
            settings=_settings(config),
            made_by=_made_by(results),
            command=command(),
            csv=table,
            **pictures,
        )

    def _floors(self) -> str:
        found = ", ".join(f"{split} {floor:.4f}" for split, floor in self.floors.items())
        return f"\nThe least BCE that any model can expect on these rows: {found}.\n" if found else ""

    def _missing(self, results: Results) -> str:
        unfinished = [f"`{case.name}`" for case in self.runs if case not in results.summaries]
        lines = [f"\nNot finished: {', '.join(unfinished)}.\n"] if unfinished else []
        lines += [f"\n* Does not fit: {reason}" for reason in self.unfit.values()]
        return "".join(lines) + ("\n" if self.unfit else "")


def scores_table(results: Results, more: Mapping[str, Mapping[Budget, str]] = {}) -> str:
    """A line a method and compression.

    Args:
        results: the runs.
        more: further columns, by title.
    """
    columns = [name for pair in SPLITS.values() for name in pair]
    rows = []
    for (method, compression), found in results.by_budget().items():
        first = found[0]
        sizes = [f"{first[size]:,}" for size in SIZES]
        ratios = [f"{first[name]:.1f}x" for name in ("compression_params", "compression_bytes")]
        scores = [mean_and_spread([run[name] for run in found]) for name in columns]
        others = [column.get((method, compression), "") for column in more.values()]
        rows.append([f"`{method}`", f"{compression:g}x", *sizes, *ratios, *scores, str(len(found)), *others])
    header = ["method", "asked", "params", "bytes in all", "fewer params", "fewer bytes"]
    return markdown_table([*header, "val BCE", "val AUROC", "test BCE", "test AUROC", "seeds", *more], rows)


def crossings_table(results: Results, split: str) -> str:
    """The smallest size at which each method's mean BCE is at or below the full table's."""
    score = SPLITS[split][0]
    levels = {size: results.level(size, score) for size in SIZES}
    rows = []
    for method in results.curves("embedding_params", score):
        cells, stays = [], True
        for size, level in levels.items():
            crossing = first_crossing(results.curves(size, score)[method], level.mean) if level else None
            cells += (
                [f"{crossing.at.size:,}", f"{level.size / crossing.at.size:.1f}x"] if level and crossing else ["-", "-"]
            )
            stays = crossing is not None and stays and crossing.stays
        rows.append([f"`{method}`", *cells, ("yes" if stays else "no") if cells[0] != "-" else "at no size tried"])
    return markdown_table([f"{split} BCE", "params", "fewer", "bytes in all", "fewer", "and at all larger sizes"], rows)


def tables_table(info: DatasetInfo, config: TrainConfig) -> str:
    """Ids of every table, and how many of them the prepared training rows have, where that was counted."""

    def seen(column: str) -> str:
        if config.dataset_name != "parquet" or config.data_path is None:
            return ""
        return f"{np.count_nonzero(np.load(column_file(Path(config.data_path).expanduser(), 'counts', column))):,}"

    features = [(feature.name, feature.num_embeddings) for feature in info.sparse_features]
    return markdown_table(
        ["table", "ids", "in training rows"], [[f"`{name}`", f"{ids:,}", seen(name)] for name, ids in features]
    )


def _settings(config: TrainConfig) -> str:
    """Those that decide what a training does and are not empty."""
    of_a_run = {"method", "compression", "seed"}
    values = {name: value for name, value in settings_that_matter(config, world_size=1).items() if name not in of_a_run}
    return ", ".join(
        f"{name} `{value}`"
        for name, value in values.items()
        if value not in (None, "", [], {}) and value is not False  # 0 is a setting
    )


def _made_by(results: Results) -> str:
    lines = [", ".join(f"{name} `{value}`" for name, value in source.items()) for source in results.made_by.values()]
    return "\n".join(f"* {lines.count(line)} runs: {line}" for line in dict.fromkeys(lines))


PAGE = """# Sweep on {data}

{scores}

Mean ± standard deviation over seeds. Validation scores are each the best of all evaluations, test scores those at the best
validation BCE. «Bytes in all» counts assignments and hash coefficients; «fewer» is against full tables, both ways.
{floors}{missing}
![Test scores by size]({test})

![Validation scores by size]({val})

## Where a method is first as good as full tables

The smallest size that was tried at which the mean BCE is at or below full tables' (the stars in the pictures; nothing is
interpolated), and whether it stays there at all larger sizes.

{crossings}

## Made by

`{command}`

{made_by}

Settings of all runs: {settings}.

{tables}

Raw numbers: [`{csv}`]({csv}).
"""
