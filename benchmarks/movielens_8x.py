"""How much is lost at eight times fewer embedding parameters? Ten seeds of every method on MovieLens-100K.

    python benchmarks/movielens_8x.py

Finished runs in `runs/movielens_8x` are not run again (`--fresh` forgets them). Writes `docs/results/movielens_8x.md`
and `.json`, and puts the table between the `movielens_8x` markers of the README. All methods have the same settings,
those of `dlrm_example.recipe`; they were chosen on another split.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlrm_example import report
from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.curves import mean_and_spread
from dlrm_example.provenance import command
from dlrm_example.recipe import movielens_config
from dlrm_example.records import Summary, read_summary, write_json
from dlrm_example.sweep.results import made_by
from dlrm_example.sweep.runs import make_all

ROOT = Path(__file__).resolve().parent.parent
NAME = "movielens_8x"
METHODS = ("full", "hashing_trick", "ce", "qr", "cce", "residual_cce")
BASELINE = "hashing_trick"
SEEDS = tuple(range(1, 11))  # three told methods apart no better than their seeds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    arguments = parser.parse_args(argv)
    set_up_logging()
    os.chdir(ROOT)
    folder = Path("runs") / NAME
    if arguments.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    configs = [run_config(method, seed, folder) for method in METHODS for seed in SEEDS]
    make_all(configs)
    runs = [read_summary(Path(config.run_dir)) for config in configs]
    table = markdown_table(runs)
    write_results(runs, table, configs[0], [Path(config.run_dir) for config in configs])
    replace_in_readme(ROOT / "README.md", table)
    print(table)
    return 0


def run_config(method: str, seed: int, folder: Path) -> TrainConfig:
    return movielens_config(method, str(folder / f"{method}-{seed}"), seed=seed)


def markdown_table(runs: Sequence[Summary]) -> str:
    """Mean and standard deviation over the seeds, a line a method."""
    header = ["method", "embedding params", "fewer params", "fewer bytes"]
    rows = []
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        ratios = [f"{ratio:.1f}x" for ratio in (mine[0].compression_params, mine[0].compression_bytes)]
        fields = ("best_val_bce", "best_val_auroc", "test_bce", "test_auroc")
        scores = [mean_and_spread([getattr(run, field) for run in mine]) for field in fields]
        rows.append([f"`{method}`", f"{mine[0].embedding_params:,}", *ratios, *scores])
    return report.markdown_table([*header, "best val BCE", "val AUROC", "test BCE", "test AUROC"], rows)


def margins(runs: Sequence[Summary]) -> dict[str, list[float]]:
    """For every method and seed, by how much its best validation BCE is below the baseline's of the same seed."""
    bce = {(run.method, run.seed): run.best_val_bce for run in runs}
    return {
        method: [bce[BASELINE, seed] - bce[method, seed] for seed in SEEDS] for method in METHODS if method != BASELINE
    }


def write_results(runs: Sequence[Summary], table: str, config: TrainConfig, folders: Sequence[Path]) -> None:
    folder = ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [{"command": command(), **made_by(run_dir)} for run_dir in folders]
    settings = {
        key: value for key, value in asdict(config).items() if key not in ("run_dir", "method", "compression", "seed")
    }
    content = {
        "provenance": [source for index, source in enumerate(sources) if source not in sources[:index]],
        "seeds": SEEDS,
        "settings": settings,
        "runs": [asdict(run) for run in runs],
        "best_val_bce_below_hashing_trick": margins(runs),
    }
    write_json(folder / f"{NAME}.json", content)
    (folder / f"{NAME}.md").write_text(_page(table, content, margins(runs)))


def _page(table: str, content: dict[str, Any], below: dict[str, list[float]]) -> str:
    sources = "\n".join(f"* {_listed(source)}" for source in content["provenance"])
    seeds = ", ".join(map(str, SEEDS))
    by_seed = ", ".join(f"{margin:.4f}" for margin in below["cce"])
    return f"""# MovieLens-100K at 8 times fewer embedding parameters

{table}

Mean ± standard deviation over seeds {seeds}. «Fewer bytes» counts what is stored beside the parameters, such as
assignments. Best validation BCE over the epochs; test scores are those of that epoch.

CCE's best validation BCE is below the hashing trick's by {mean_and_spread(below["cce"])} (seed by seed: {by_seed}).

Settings, the same for all methods, chosen on another split (`--discard_last 2`): {_listed(content["settings"])}.

Made by:

{sources}

Raw numbers: [`{NAME}.json`]({NAME}.json).
"""


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} `{value}`" for name, value in values.items())


def replace_in_readme(readme: Path, table: str) -> None:
    """Put the table between the markers, where there are any."""
    start, end = f"<!-- {NAME}:start -->", f"<!-- {NAME}:end -->"
    text = readme.read_text() if readme.exists() else ""
    if start not in text or end not in text:
        return
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    readme.write_text(f"{before}{start}\n{table}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
