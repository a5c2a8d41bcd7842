"""What happens to an id outside [0, num_embeddings): FBGEMM's ``BoundsCheckMode``, for the ids we look at first."""

import logging

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

logger = logging.getLogger(__name__)

FATAL = (BoundsCheckMode.FATAL, BoundsCheckMode.V2_FATAL)
_WARNING = (BoundsCheckMode.WARNING, BoundsCheckMode.V2_WARNING)


class BoundsCheck:
    """Checks the ids of one table and counts the bad ones.

    Args:
        config: of the table; ids must lie in [0, num_embeddings), which may grow.
        mode: FATAL raises an ``IndexError`` (on CUDA a device-side assertion, as FBGEMM's), WARNING counts, logs and maps
            the id to 0, IGNORE maps it to 0, NONE trusts the caller.
    """

    def __init__(self, config: EmbeddingBagConfig, mode: BoundsCheckMode) -> None:
        self._config, self.mode = config, mode
        self.num_out_of_bounds = 0

    @property
    def num_embeddings(self) -> int:
        """V, at this time."""
        return self._config.num_embeddings

    def __call__(self, ids_N: Tensor) -> Tensor:
        """Return ids that are safe to look up."""
        if self.mode == BoundsCheckMode.NONE or ids_N.numel() == 0:
            return ids_N
        if ids_N.device.type == "cpu":
            low, high = torch.aminmax(ids_N)
            if low >= 0 and high < self.num_embeddings:
                return ids_N
        bad_N = (ids_N < 0) | (ids_N >= self.num_embeddings)
        if self.mode in FATAL:
            self._fail(ids_N, bad_N)
        elif self.mode in _WARNING and ids_N.device.type == "cpu":
            self._warn(ids_N, bad_N)
        return ids_N.masked_fill(bad_N, 0)

    def _fail(self, ids_N: Tensor, bad_N: Tensor) -> None:
        if ids_N.device.type != "cpu":
            torch._assert_async(~bad_N.any())
            return
        raise IndexError(
            f"Table {self._config.name!r}: id {int(ids_N[bad_N][0])} is outside [0, {self.num_embeddings}) "
            f"({int(bad_N.sum())} of {ids_N.numel()} ids are). Raise num_embeddings, map the ids, or choose "
            "bounds_check_mode=BoundsCheckMode.WARNING to look them up as id 0."
        )

    def _warn(self, ids_N: Tensor, bad_N: Tensor) -> None:
        self.num_out_of_bounds += int(bad_N.sum())
        logger.warning(
            "Table %r: id %d is outside [0, %d) and is looked up as id 0; %d such ids so far.",
            self._config.name,
            int(ids_N[bad_N][0]),
            self.num_embeddings,
            self.num_out_of_bounds,
        )
