"""Train a DLRM: `python -m dlrm_example.train --method cce --run_dir runs/x`, on several ranks with torchrun.

The steps: data -> a method for every table -> DLRM -> sharded model -> training loop -> summary.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec import CompressedEmbeddingBagConfig, ReclusterSchedule
from cce_torchrec.memory import MemoryReport
from dlrm_example.board import Board, check_tensorboard
from dlrm_example.budget import plan_tables
from dlrm_example.checkpoints import Checkpoint, Checkpoints, find_checkpoint
from dlrm_example.cli import parse_config
from dlrm_example.commands import exit_code
from dlrm_example.config import TrainConfig, UsageError, divide_global_batch, recluster_config
from dlrm_example.console import is_main_process, log_of_this_rank, set_up_logging
from dlrm_example.data import DATASETS, ColumnChoice, Dataset
from dlrm_example.distributed import World, elastic_job, main_rank_first, on_main_rank, process_group, restarts
from dlrm_example.model import build_model, build_optimizer, collection_of, shard_model
from dlrm_example.progress import Progress
from dlrm_example.provenance import commit, hardware
from dlrm_example.records import TENSORBOARD, RunFiles, Summary, check_free
from dlrm_example.report import summary_table
from dlrm_example.stop import stop_on_sigterm
from dlrm_example.trainer import Loaders, Trainer

logger = logging.getLogger("dlrm_example.train")  # under `python -m`, __name__ is "__main__", which is not shown


def main(argv: Sequence[str] | None = None) -> int:
    """One run; returns its exit code, see :func:`exit_code`."""
    set_up_logging()

    def run() -> None:
        summary = train(parse_config(argv))
        if is_main_process():
            print(summary_table([summary]))

    return exit_code(run)


def train(config: TrainConfig) -> Summary:
    """One run from data to summary; what it prints and writes, rank 0 prints and writes."""
    with (
        process_group(config.collective_timeout) as world,
        log_of_this_rank(config.run_dir, world.rank, world.size),
        stop_on_sigterm() as stop,
    ):
        config = divide_global_batch(config, world.size)
        set_up_process(config)
        dataset = load_dataset(config, world)
        tables = plan_tables(dataset.info, config)
        files = RunFiles(config.run_dir, world.is_main)
        checkpoint = on_main_rank(world, lambda: start_files(files, config, world))

        model = build_model(tables, dataset.info, config)
        memory = collection_of(model).memory_report()
        sharded_model = shard_model(model, config, world)
        optimizer = build_optimizer(sharded_model, config)
        loaders = make_loaders(dataset, config, world)
        schedule = make_schedule(tables, len(loaders.train) * config.epochs, config)

        logger.info("embedding tables:\n%s", memory)
        progress = start_progress(checkpoint, sharded_model, optimizer, config, world)
        board = make_board(config, progress, world)
        Trainer(sharded_model, optimizer, loaders, schedule, files, board, config, world).fit(progress, stop)
        board.close()
        summary = summarise(progress, memory, config, world)
        files.finish(summary)
        return summary


def set_up_process(config: TrainConfig) -> None:
    """Threads, and the random state that every rank starts from."""
    if config.tensorboard:
        check_tensorboard()
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)


def load_dataset(config: TrainConfig, world: World) -> Dataset:
    """The data set, fetched by rank 0 where it is not cached."""
    with main_rank_first(world):
        return open_dataset(config)


def open_dataset(config: TrainConfig) -> Dataset:
    """The data set, as one process opens it."""
    columns = ColumnChoice(
        label=config.label_column,
        dense=config.dense_columns,
        sparse=config.sparse_columns,
        num_embeddings=config.num_embeddings_per_feature,
        multi_hot_sizes=config.multi_hot_sizes,
        multi_hot_distribution=config.multi_hot_distribution_type,
    )
    return DATASETS[config.dataset_name](config.data_path, discard_last=config.discard_last, columns=columns)


def start_files(files: RunFiles, config: TrainConfig, world: World) -> Checkpoint | None:
    """Prepare the run's folder, for a new run or to go on from the checkpoint that is returned.

    A job whose processes are started again goes on, whether or not it was told `--resume`.

    Raises:
        UsageError: another run is there.
    """
    going_on = config.resume or restarts() > 0 or files.are_of(elastic_job())
    checkpoint = find_checkpoint(config, world.size) if going_on else None
    if checkpoint is None:
        if going_on:
            logger.info("--resume: no complete checkpoint in %s, so the run starts afresh", config.run_dir)
        check_free(files.folder, config.overwrite)
        files.start(config, about_this_run())
    else:
        files.go_on(config, about_this_run(), checkpoint.metrics_bytes)
    return checkpoint


def start_progress(
    checkpoint: Checkpoint | None,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    config: TrainConfig,
    world: World,
) -> Progress:
    """Where training starts: at the beginning, or at the checkpoint, which is loaded."""
    return Checkpoints(config, world).load(checkpoint, model, optimizer) if checkpoint else Progress()


def make_board(config: TrainConfig, progress: Progress, world: World) -> Board:
    """TensorBoard's files, on rank 0 and where they are asked for."""
    wanted = config.tensorboard and world.is_main
    return Board(Path(config.run_dir) / TENSORBOARD if wanted else None, first_step=progress.step + 1)


def make_loaders(dataset: Dataset, config: TrainConfig, world: World) -> Loaders:
    """This rank's batches; only training ones are shuffled."""
    ranks = {"rank": world.rank, "world_size": world.size}
    test_size = config.test_batch_size
    return Loaders(
        train=dataset.loader(
            "train",
            batch_size=config.batch_size,
            limit_batches=config.limit_train_batches,
            shuffle_seed=config.seed,
            **ranks,
        ),
        val=dataset.loader("val", batch_size=test_size, limit_batches=config.limit_val_batches, **ranks),
        test=dataset.loader("test", batch_size=test_size, limit_batches=config.limit_test_batches, **ranks),
    )


def make_schedule(
    tables: list[CompressedEmbeddingBagConfig], total_steps: int, config: TrainConfig
) -> ReclusterSchedule | None:
    """When to re-cluster, or None where no table can be or the count is 0."""
    names = [table.name for table in tables if table.method.reclusterable]
    if not names or not config.recluster_count:
        logger.info("no re-clustering (%s)", "--recluster_count 0" if names else f"method {config.method} has none")
        return None
    try:
        schedule = ReclusterSchedule(
            total_steps=total_steps,
            count=config.recluster_count,
            stop_after_fraction=config.recluster_stop_after,
            gradient_steps=config.recluster_gradient_steps,
            background_steps=config.recluster_background_steps,
            seed=config.seed,
            config=recluster_config(config),
        )
    except ValueError as error:  # all else was looked at before the length of the training was known
        raise UsageError(f"--recluster_{error}") from None
    logger.info("re-clustering %s after steps %s of %d", ", ".join(names), schedule.steps, total_steps)
    return schedule


def summarise(progress: Progress, memory: MemoryReport, config: TrainConfig, world: World) -> Summary:
    best = progress.best
    assert best is not None, "a run evaluates at its end"
    test = best.test or next(each.test for each in reversed(progress.evaluations) if each.test)
    return Summary(
        method=config.method,
        embedding_params=memory.total.num_params,
        embedding_bytes=memory.total.codebook_bytes + memory.total.assignment_bytes,
        full_embedding_params=memory.total.full_params,
        compression_params=memory.parameter_ratio,
        compression_bytes=memory.bytes_ratio,
        best_val_bce=best.val.bce,
        best_val_auroc=max(evaluation.val.auroc for evaluation in progress.evaluations),
        best_step=best.step,
        best_epoch=best.epoch,
        test_bce=test.bce,
        test_auroc=test.auroc,
        test_ne=test.ne,
        test_calibration=test.calibration,
        target_auroc_step=progress.step_of(config.validation_auroc),
        steps=progress.step,
        samples=progress.samples,
        train_seconds=progress.train_seconds,
        recluster_seconds=progress.recluster_seconds,
        reclusterings=progress.reclusterings,
        world_size=world.size,
        seed=config.seed,
    )


def about_this_run() -> dict[str, Any]:
    """What `config.json` says beside the config."""
    versions = {name: version(name) for name in ("cce-torchrec", "torch", "torchrec")}
    return {"versions": versions, "elastic_job": elastic_job(), "commit": commit(), "hardware": hardware()}


if __name__ == "__main__":
    sys.exit(main())
