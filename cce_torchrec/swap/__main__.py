"""Run an unmodified TorchRec training script with compressed tables.

python -m cce_torchrec.swap --config swap.yaml script.py args...
torchrun --nproc_per_node 2 -m cce_torchrec.swap --config swap.yaml script.py args...
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from cce_torchrec.swap.config import SwapConfig
from cce_torchrec.swap.patches import swapped


def main(arguments: Sequence[str]) -> None:
    """Run a script as ``python script.py args...`` would, with what a file says swapped in."""
    parser = argparse.ArgumentParser(
        prog="python -m cce_torchrec.swap", description="Run a TorchRec training script with compressed tables."
    )
    parser.add_argument(
        "--config", required=True, help="YAML file with rules, and when to re-cluster; see docs/budget.md"
    )
    parser.add_argument("script", help="the script, as it is")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    try:
        config = SwapConfig.load(options.config)
    except ValueError as error:
        parser.error(str(error))
    if not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script!r}")
    sys.argv = [options.script, *options.args]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    with swapped(config) as swap:
        runpy.run_path(options.script, run_name="__main__")
        swap.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
