"""Finished runs as a table of plain text, and tables of Markdown."""

from collections.abc import Iterable, Sequence

from dlrm_example.records import Summary

_COLUMNS = (
    ("method", lambda run: run.method),
    ("embedding params", lambda run: f"{run.embedding_params:,}"),
    ("fewer params", lambda run: f"{run.compression_params:.1f}x"),
    ("fewer bytes", lambda run: f"{run.compression_bytes:.1f}x"),
    ("best val BCE", lambda run: f"{run.best_val_bce:.4f}"),
    ("best val AUROC", lambda run: f"{run.best_val_auroc:.4f}"),
    ("test BCE", lambda run: f"{run.test_bce:.4f}"),
    ("test AUROC", lambda run: f"{run.test_auroc:.4f}"),
    ("best epoch", lambda run: str(run.best_epoch)),
    ("train s", lambda run: f"{run.train_seconds:.1f}"),
    ("recluster s", lambda run: f"{run.recluster_seconds:.1f}"),
)


def summary_table(runs: Sequence[Summary]) -> str:
    """One line a run, under a heading."""
    return text_table([name for name, _ in _COLUMNS], [[cell(run) for _, cell in _COLUMNS] for run in runs])


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is aligned left, the others right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
