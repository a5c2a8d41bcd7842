"""The dense parameters of a collection: decoders and projections, which TorchRec replicates as any dense module's.

A dense optimizer trains them, or one that was applied in backward; the state of the latter is part of ``fused_optimizer``.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from cce_torchrec.lowering import Table
from cce_torchrec.methods import DensePart


class DenseParts(nn.ModuleDict, FusedOptimizerModule):
    """The decoder or projection of each table that has one, by name of the logical table."""

    def __init__(self, tables: Sequence[Table]) -> None:
        super().__init__({table.name: table.dense_part for table in tables if table.dense_part is not None})

    def reset_parameters(self) -> None:
        """Draw all parameters and compute all buffers anew."""
        for part in self.values():
            cast(DensePart, part).reset_parameters()

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizers that were applied in backward, which checkpoints save."""
        return _InBackward(self)


class _InBackward(FusedOptimizer):
    """The optimizers applied in backward to the parameters of a module, whatever these are at the time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        super().__init__(self.params, {}, [])

    @property
    def params(self) -> Mapping[str, nn.Parameter]:
        """Those that have such an optimizer, by name."""
        named = self._module.named_parameters()
        return {name: parameter for name, parameter in named if hasattr(parameter, "_in_backward_optimizers")}

    @params.setter
    def params(self, value: Mapping[str, nn.Parameter]) -> None:
        """What the base class would keep is dropped, here and below: DDP's modules may be given other parameters."""

    def _optimizers(self) -> list[Optimizer]:
        return [optimizer for p in self.params.values() for optimizer in getattr(p, "_in_backward_optimizers", [])]

    @property
    def state(self) -> Mapping[Any, Any]:
        """The optimizers' own, by parameter."""
        return {parameter: state for optimizer in self._optimizers() for parameter, state in optimizer.state.items()}

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        pass

    @property
    def param_groups(self) -> Collection[Mapping[str, Any]]:
        """The optimizers' own, such as their learning rates."""
        return [group for optimizer in self._optimizers() for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: Collection[Mapping[str, Any]]) -> None:
        pass

    def step(self, closure: Any = None) -> None:
        """Nothing: the step was taken in backward."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing: the gradient was used up in backward."""
