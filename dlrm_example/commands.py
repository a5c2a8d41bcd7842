"""How a command ends: its exit code, and one line instead of a traceback where the user can do something about it."""

import sys
from collections.abc import Callable

from dlrm_example.checkpoints import CheckpointFailedError
from dlrm_example.config import UsageError
from dlrm_example.console import is_main_process
from dlrm_example.data import DataUnavailableError
from dlrm_example.divergence import TrainingDivergedError
from dlrm_example.roll_call import RanksLostError
from dlrm_example.stop import StoppedError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TERMINATED = 143  # 128 + SIGTERM

_SAME_ON_EVERY_RANK = (UsageError, TrainingDivergedError, CheckpointFailedError)
_OF_ONE_RANK = (DataUnavailableError, RanksLostError)


def exit_code(run: Callable[[], None], again: str = "with --resume") -> int:
    """What schedulers look at.

    0 for a finished run, 2 for flags that cannot be, 1 for data, training, disks or ranks that failed, 130 for Ctrl-C, and
    143 for a run that was stopped by SIGTERM and goes on from its checkpoint when it is started again.

    Args:
        run: what the command does.
        again: how to start it again so that it goes on.
    """
    try:
        run()
    except (*_SAME_ON_EVERY_RANK, *_OF_ONE_RANK) as error:
        if is_main_process() or isinstance(error, _OF_ONE_RANK):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\ninterrupted; a run with --run_dir goes on from its last checkpoint {again}", file=sys.stderr)
        return INTERRUPTED
    except StoppedError as error:
        if is_main_process():
            print(f"{error}; goes on {again}", file=sys.stderr)
        return TERMINATED
    return 0
