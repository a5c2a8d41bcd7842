"""What is written down of a re-clustering: a row of the metrics, and scalars and histograms for TensorBoard."""

from dataclasses import asdict

from torch import nn

from cce_torchrec import ReclusterReport
from dlrm_example.assignments import assignment_counts, entropy_bits
from dlrm_example.board import Board
from dlrm_example.progress import Progress
from dlrm_example.records import RunFiles


def record_reclustering(
    report: ReclusterReport, seconds: float, progress: Progress, model: nn.Module, files: RunFiles, board: Board
) -> None:
    """Account for it in the progress too; collective."""
    progress.recluster_seconds += seconds
    progress.reclusterings += 1
    counts = assignment_counts(model)
    tables = []
    for table in report.tables:
        entropy = entropy_bits(counts[table.table])
        tables.append({**asdict(table), "assignment_entropy_bits": entropy})
        group = f"recluster/{table.table}"
        scores = {"relative_squared_error": table.relative_squared_error, "moved_fraction": table.moved_fraction}
        board.add(group, progress.step, **scores)
        for column, (bits, counts_K) in enumerate(zip(entropy, counts[table.table].numpy(), strict=True)):
            board.add(f"{group}/assignment_entropy_bits", progress.step, **{f"column_{column}": bits})
            board.add_counts(f"{group}/assignments/column_{column}", progress.step, counts_K)
    files.log(event="recluster", step=progress.step, epoch=progress.epoch, seconds=seconds, tables=tables)
