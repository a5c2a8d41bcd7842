"""What a model would take on N devices, without any of them: bytes a rank, traffic a step, time of a re-clustering.

python -m cce_torchrec.simulate --config model.yaml --world_sizes 8 128 1024 --machine machine.json
"""

from cce_torchrec.simulate.config import SimulationConfig
from cce_torchrec.simulate.machine import Machine, Network, measure
from cce_torchrec.simulate.simulation import Simulation, simulate

__all__ = ["Machine", "Network", "Simulation", "SimulationConfig", "measure", "simulate"]
