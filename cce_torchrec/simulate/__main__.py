"""Say what a model would take on so many devices.

python -m cce_torchrec.simulate --config model.yaml --world_sizes 8 128 1024 --machine machine.json --json result.json
python -m cce_torchrec.simulate.measure --machine machine.json        # on the machine; by torchrun, its network too
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cce_torchrec.simulate.config import SimulationConfig
from cce_torchrec.simulate.machine import Machine
from cce_torchrec.simulate.simulation import Simulation, simulate

_HEADER = (
    f"{'ranks':>6}{'GB a rank':>11}{'mean':>9}{'ids MB a step':>15}{'vectors MB':>12}{'gradients MB':>14}{'loss':>8}"
    f"{'distances':>11}{'reclust. s':>12}{'planned in s':>14}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, count, print, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m cce_torchrec.simulate", description="What a model takes on N devices."
    )
    parser.add_argument("--config", required=True, help="YAML file with tables and a budget; see docs/planner.md")
    parser.add_argument("--world_sizes", type=int, nargs="+", required=True, help="numbers of devices")
    parser.add_argument("--machine", help="rates, as measured by python -m cce_torchrec.simulate.measure")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    try:
        config = SimulationConfig.load(options.config)
        machine = None if options.machine is None else Machine.load(options.machine)
        simulations = [simulate(config, world_size, machine) for world_size in options.world_sizes]
    except ValueError as error:
        parser.error(str(error))
    print(table(simulations))
    if machine is not None and machine.network is None and config.network is None and max(options.world_sizes) > 1:
        print(
            f"Seconds are without communication: {options.machine} was measured on one rank. Measure by torchrun, or give "
            "the network in the config."
        )
    if options.json is not None:
        text = json.dumps([simulation.summary() for simulation in simulations], indent=1) + "\n"
        try:
            options.json.write_text(text)
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error}")


def table(simulations: Sequence[Simulation]) -> str:
    """A line for each number of devices."""
    lines = [_HEADER]
    for each in simulations:
        most, mean = each.rank_bytes
        seconds = "" if each.recluster_seconds is None else f"{sum(each.recluster_seconds.values()):,.0f}"
        ids = each.sent.ids + each.sent.assignments
        lines.append(
            f"{each.plan.world_size:>6}{most / 1e9:>11.2f}{mean / 1e9:>9.2f}{ids / 1e6:>15.2f}"
            f"{each.sent.vectors / 1e6:>12.2f}{each.sent.gradients / 1e6:>14.2f}{each.plan.loss:>8.4f}"
            f"{each.distances:>11.2e}{seconds:>12}{each.planning_seconds:>14.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
