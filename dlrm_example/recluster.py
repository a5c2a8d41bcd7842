"""Re-cluster a saved model, outside any training: `python -m dlrm_example.recluster --run_dir RUN --output_dir NEW`.

The last complete checkpoint of RUN is loaded, on any number of ranks, re-clustered, and saved as a checkpoint of a run of
its own: `python -m dlrm_example.train ... --run_dir NEW --resume` trains on from it. RUN stays as it is.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec import ReclusterReport, recluster
from dlrm_example.board import Board
from dlrm_example.budget import plan_tables
from dlrm_example.checkpoints import ROWS_A_STEP, Checkpoint, Checkpoints, complete_checkpoints
from dlrm_example.commands import exit_code
from dlrm_example.config import TrainConfig, UsageError, divide_global_batch, recluster_config
from dlrm_example.console import log_of_this_rank, set_up_logging
from dlrm_example.distributed import World, on_main_rank, process_group
from dlrm_example.model import build_model, build_optimizer, shard_model
from dlrm_example.reclustering import record_reclustering
from dlrm_example.records import CHECKPOINTS, SUMMARY, RunFiles, read_config
from dlrm_example.train import about_this_run, load_dataset, make_loaders, set_up_process
from dlrm_example.trainer import evaluation

logger = logging.getLogger("dlrm_example.recluster")  # under `python -m`, __name__ is "__main__"


def main(argv: Sequence[str] | None = None) -> int:
    """One re-clustering; returns its exit code, see :func:`exit_code`."""
    set_up_logging()
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: recluster_run(Path(arguments.run_dir), Path(arguments.output_dir), arguments.seed))


def recluster_run(run_dir: Path, output_dir: Path, seed: int) -> None:
    """Load, re-cluster, compare validation scores, save.

    Raises:
        UsageError: there is no checkpoint, nothing in it to re-cluster, or a run in the output's folder.
    """
    saved = read_config(run_dir)
    with process_group(saved.collective_timeout) as world, log_of_this_rank(str(output_dir), world.rank, world.size):
        checkpoint = on_main_rank(world, lambda: _last_checkpoint(run_dir, output_dir))
        config = _config(saved, output_dir, checkpoint, world)
        set_up_process(config)
        dataset = load_dataset(config, world)
        model = shard_model(build_model(plan_tables(dataset.info, config), dataset.info, config), config, world)
        optimizer = build_optimizer(model, config)

        checkpoints = Checkpoints(config, world)
        progress = checkpoints.load(checkpoint, model, optimizer)
        loaders = make_loaders(dataset, config, world)
        before = evaluation(model, loaders, progress, world, progress.improves)
        report = _recluster(model, optimizer, seed, config)
        files = RunFiles(str(output_dir), world.is_main)
        on_main_rank(world, lambda: files.start_from(run_dir, config, about_this_run(), checkpoint.metrics_bytes))
        record_reclustering(report, progress, model, files, Board(None, progress.step))
        progress.evaluations.append(evaluation(model, loaders, progress, world, progress.improves))
        files.log_evaluation(progress.evaluations[-1])
        checkpoints.save(model, optimizer, progress, files.metrics_bytes())
        logger.info("re-clustered %s into %s:\n%s", checkpoint.path, output_dir, report)
        logger.info("val bce %.4f before, %.4f after", before.val.bce, progress.evaluations[-1].val.bce)


def _last_checkpoint(run_dir: Path, output_dir: Path) -> Checkpoint:
    if (output_dir / SUMMARY).exists() or complete_checkpoints(output_dir / CHECKPOINTS):
        raise UsageError(f"--output_dir {output_dir} holds a run: choose another folder")
    found = complete_checkpoints(run_dir / CHECKPOINTS)
    if not found:
        raise UsageError(f"--run_dir {run_dir} has no complete checkpoint")
    return found[-1]


def _config(saved: TrainConfig, output_dir: Path, checkpoint: Checkpoint, world: World) -> TrainConfig:
    """The run's config, for as many rows a step on this number of ranks."""
    rows = int(checkpoint.settings[ROWS_A_STEP])
    config = dataclasses.replace(saved, run_dir=str(output_dir), global_batch_size=rows, resume=False, overwrite=False)
    return divide_global_batch(config, world.size)


def _recluster(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, seed: int, config: TrainConfig
) -> ReclusterReport:
    try:
        settings = recluster_config(config)
        return recluster(model, seed=seed, config=settings, optimizer=optimizer)
    except ValueError as error:
        raise UsageError(f"this checkpoint cannot be re-clustered: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlrm_example.recluster", description=__doc__)
    parser.add_argument("--run_dir", required=True, help="a run with checkpoints; the last complete one is taken")
    parser.add_argument("--output_dir", required=True, help="where the run with the re-clustered checkpoint goes")
    seed_help = "of the sample, the K-means and the new helper hashes (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
