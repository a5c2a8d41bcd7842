"""Methods with dense parameters train in the example, on one rank and on two; the dense optimizer has those parameters."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.checkpoint as dcp

from cce_torchrec import METHODS
from dlrm_example.config import TrainConfig
from tests.distributed.harness import RankPool
from tests.toys import Thin, Waves

pytestmark = pytest.mark.distributed

TOYS = {method.key: method for method in (Waves, Thin)}


def run(rank: int, world_size: int, config: TrainConfig) -> dict[str, object]:
    with warnings.catch_warnings(), mock.patch.dict(METHODS, TOYS):
        warnings.simplefilter("ignore")
        from dlrm_example.train import train

        return dataclasses.asdict(train(config))


@pytest.mark.parametrize(("method", "min_rows"), [("waves", 100), ("waves", 1), ("thin", 100)])
def test_one_rank_and_two(
    method: str, min_rows: int, small_config: Callable[..., TrainConfig], ranks2: RankPool
) -> None:
    settings = {"method": method, "compression": 1.0, "checkpoint_every_epochs": 1, "adagrad": True}
    settings |= {"min_compressed_rows": min_rows, "print_sharding_plan": True, "batch_size": 1000, "epochs": 1}
    with mock.patch.dict(METHODS, TOYS):
        standing = run(0, 1, small_config("standing", learning_rate=1e-12, **settings))
        alone = run(0, 1, small_config("alone", learning_rate=0.1, **settings))
        config = small_config("together", learning_rate=0.1, **settings | {"batch_size": 500})
        together, second = ranks2.run(run, config)
    assert together["best_val_bce"] == second["best_val_bce"]
    for summary in (alone, together):
        assert summary["best_val_bce"] < standing["best_val_bce"]  # type: ignore[operator]
    (metadata,) = Path(config.run_dir).rglob(".metadata")
    saved = dcp.FileSystemReader(metadata.parent).read_metadata().state_dict_metadata
    parameters = {name.removeprefix("model.") for name in saved if name.startswith("model.") and "_decoders." in name}
    trained = [name for name in saved if name.startswith("optimizer.state.") and "_decoders." in name]
    assert any(name.rpartition(".")[0].endswith(tuple(parameters)) for name in trained)
