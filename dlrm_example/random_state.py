"""The state of torch's random generators, a file a rank.

The example draws nothing while it trains; a model with dropout would, and would go on with the same draws.
"""

from pathlib import Path

import torch

from dlrm_example.distributed import World


def save_random_state(folder: Path, world: World) -> None:
    """Write this rank's state.

    Raises:
        OSError: it cannot be written.
    """
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    try:
        torch.save(state, _file(folder, world))
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error)) from error


def load_random_state(folder: Path, world: World) -> None:
    """Go on from this rank's state; a rank that was not there when it was saved keeps the one it has."""
    if not _file(folder, world).exists():
        return
    state = torch.load(_file(folder, world), map_location="cpu")
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _file(folder: Path, world: World) -> Path:
    return folder / f"random_{world.rank}.pt"
