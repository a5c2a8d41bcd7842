"""Optimizers applied in backward: what was asked for a parameter, asked again for the one that takes its place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import optim as torchrec_optim
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

# TorchRec's own classes are names for FBGEMM's fused ones and cannot step; these can, with the same arithmetic.
RUNNABLE: dict[type, type[torch.optim.Optimizer]] = {
    RowWiseAdagrad: RowWiseAdagrad,
    torch.optim.SGD: torch.optim.SGD,
    torch.optim.Adagrad: torch.optim.Adagrad,
    torch.optim.Adam: torch.optim.Adam,
    torchrec_optim.SGD: torch.optim.SGD,
    torchrec_optim.Adagrad: torch.optim.Adagrad,
    torchrec_optim.Adam: torch.optim.Adam,
}


class OptimizerRequest(NamedTuple):
    """What ``apply_optimizer_in_backward`` asked for one parameter."""

    optimizer: type
    options: dict[str, Any]


def requests_of(parameter: nn.Parameter) -> list[OptimizerRequest]:
    """What was asked for a parameter; an empty list where nothing was."""
    classes, options = getattr(parameter, "_optimizer_classes", []), getattr(parameter, "_optimizer_kwargs", [])
    return [OptimizerRequest(cls, dict(opts)) for cls, opts in zip(classes, options, strict=True)]


@torch.enable_grad()
def apply_requests(requests: Sequence[OptimizerRequest], parameter: nn.Parameter) -> None:
    """Ask the same for another parameter."""
    for request in requests:
        apply_optimizer_in_backward(request.optimizer, [parameter], request.options)


def apply_in_ddp(table: str, requests: Sequence[OptimizerRequest], parameter: nn.Parameter) -> None:
    """Ask for a dense parameter, which DDP replicates, what was asked for it before, with a class that can step.

    Raises:
        ValueError: where there is no such class, or DDP cannot step it.
    """
    for request in requests:
        if request.optimizer not in RUNNABLE:
            names = sorted({cls.__name__ for cls in RUNNABLE})
            raise ValueError(
                f"Table {table!r} has dense parameters, to which {request.optimizer.__name__} cannot be applied in backward: "
                f"use one of {names}, or train them by a dense optimizer."
            )
        if not torch.accelerator.is_available():
            raise ValueError(
                f"{request.optimizer.__name__} was applied in backward to the dense parameters of table {table!r}, and "
                "torch's DistributedDataParallel steps it on accelerators only: apply it to "
                "collection.codebook_parameters(), and train the others by a dense optimizer."
            )
        apply_requests([OptimizerRequest(RUNNABLE[request.optimizer], request.options)], parameter)
