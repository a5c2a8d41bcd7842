"""Do hot ids help the DLRM? CCE on MovieLens-100K at eight times fewer parameters, with rows for none, some and many of them.

    python -m benchmarks.hot_ids

Finished runs in `runs/hot_ids` are not run again. Writes `docs/results/hot_ids.md`.
"""

import sys
from pathlib import Path

from benchmarks.harness import RESULTS
from dlrm_example.config import TrainConfig
from dlrm_example.console import set_up_logging
from dlrm_example.curves import mean_and_spread
from dlrm_example.provenance import command
from dlrm_example.recipe import movielens_config
from dlrm_example.records import Summary, read_summary
from dlrm_example.report import markdown_table
from dlrm_example.sweep.results import made_by
from dlrm_example.sweep.runs import make_all

FOLDER = Path("runs") / "hot_ids"
NUMBERS = (0, 8, 16, 32)
SEEDS = (1, 2, 3, 4, 5, 6)


def run_config(number: int, seed: int) -> TrainConfig:
    folder = str(FOLDER / f"{number}-{seed}")
    return movielens_config("cce", folder, seed=seed, method_options={"num_hot_ids": number})


def table(runs: dict[tuple[int, int], Summary]) -> str:
    """Scores by number of hot ids, and by how much they differ from those without, seed by seed."""
    rows = []
    for number in NUMBERS:
        mine = [runs[number, seed] for seed in SEEDS]
        fields = ("best_val_bce", "best_val_auroc", "test_bce", "test_auroc")
        scores = [mean_and_spread([getattr(run, field) for run in mine]) for field in fields]
        gains = [runs[number, seed].best_val_bce - runs[0, seed].best_val_bce for seed in SEEDS]
        difference = mean_and_spread(gains) if number else ""
        rows.append([str(number), f"{mine[0].embedding_params:,}", f"{mine[0].embedding_bytes:,}", *scores, difference])
    header = ("hot ids a table", "params", "bytes in all", "best val BCE", "val AUROC", "test BCE", "test AUROC")
    return markdown_table([*header, "val BCE, less that of none"], rows)


def main() -> int:
    set_up_logging()
    configs = {(number, seed): run_config(number, seed) for number in NUMBERS for seed in SEEDS}
    make_all(list(configs.values()))
    runs = {case: read_summary(Path(config.run_dir)) for case, config in configs.items()}
    sources = {str(source): source for source in (made_by(Path(config.run_dir)) for config in configs.values())}
    page = PAGE.format(
        table=table(runs),
        seeds=len(SEEDS),
        command=command(),
        made_by="\n".join("* " + ", ".join(f"{k} `{v}`" for k, v in source.items()) for source in sources.values()),
    )
    (RESULTS / "hot_ids.md").write_text(page)
    print(page)
    return 0


PAGE = """# Hot ids in the DLRM

{table}

CCE on MovieLens-100K at eight times fewer embedding parameters, the settings of
[movielens_8x.md](movielens_8x.md), with `num_hot_ids` in each table that is compressed: the smallest of them has 88 rows.
Mean ± standard deviation over {seeds} seeds; the last column is over the differences seed by seed. Ids are not numbered
by frequency, so hot ids are known from the first re-clustering on.

Made by `{command}`:

{made_by}
"""

if __name__ == "__main__":
    sys.exit(main())
