"""How a command ends: its exit code, and one line instead of a traceback where the user can do something about it."""

import sys
from collections.abc import Callable

from dlrm_example.config import UsageError
from dlrm_example.console import is_main_process
from dlrm_example.data import DataUnavailableError
from dlrm_example.trainer import TrainingDivergedError


def exit_code(run: Callable[[], None]) -> int:
    """0 for a finished run, 2 for flags that cannot be, 1 for data or training that failed, 130 for Ctrl-C."""
    try:
        run()
    except (UsageError, DataUnavailableError, TrainingDivergedError) as error:
        if is_main_process() or isinstance(error, DataUnavailableError):  # the others are the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        if is_main_process():
            print("\ninterrupted; a run with --run_dir goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0
