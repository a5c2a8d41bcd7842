"""Measure the rates of this machine.

python -m cce_torchrec.simulate.measure --machine machine.json
torchrun --nproc_per_node 8 -m cce_torchrec.simulate.measure --machine machine.json
"""

import argparse
import os
import platform
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cce_torchrec.simulate.machine import measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on all ranks that were started, and write from the first."""
    parser = argparse.ArgumentParser(prog="python -m cce_torchrec.simulate.measure", description=__doc__)
    parser.add_argument("--machine", required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    machine = measure(f"{hardware}, {ranks} ranks of {torch.get_num_threads()} threads", device)
    if rank == 0:
        machine.save(options.machine)
        print(machine)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
