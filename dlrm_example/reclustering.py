"""What is written down of a re-clustering: a row of the metrics, and scalars and histograms for TensorBoard."""

from dataclasses import asdict

from torch import nn

from cce_torchrec import ReclusterReport
from dlrm_example.assignments import assignment_counts, entropy_bits
from dlrm_example.board import Board
from dlrm_example.progress import Progress
from dlrm_example.records import RunFiles


def record_reclustering(
    report: ReclusterReport, progress: Progress, model: nn.Module, files: RunFiles, board: Board
) -> None:
    """Account for it in the progress too; collective."""
    progress.recluster_seconds += report.stalled_seconds
    progress.reclusterings += 1
    step = progress.step
    entropies: dict[str, list[float]] = {table.table: [] for table in report.tables}
    for table, column, counts_K in assignment_counts(model):
        entropies[table].append(entropy_bits(counts_K))
        board.add(f"recluster/{table}/assignment_entropy_bits", step, **{f"column_{column}": entropies[table][-1]})
        board.add_counts(f"recluster/{table}/assignments/column_{column}", step, counts_K.numpy())
    for changed in report.tables:
        scores = {"relative_squared_error": changed.relative_squared_error, "moved_fraction": changed.moved_fraction}
        board.add(f"recluster/{changed.table}", step, **scores)
    tables = [{**asdict(each), "assignment_entropy_bits": entropies[each.table]} for each in report.tables]
    files.log(event="recluster", step=step, epoch=progress.epoch, seconds=report.stalled_seconds, tables=tables)
