"""The learning rate of every step, by a loop in the words of torchrec_dlrm's flags; and the weights it leads to."""

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cce_torchrec.checkpoint import load_checkpoint
from dlrm_example.budget import plan_tables
from dlrm_example.config import TrainConfig
from dlrm_example.data import DATASETS
from dlrm_example.lr_schedule import LearningRateSchedule
from dlrm_example.model import build_model
from tests.distributed.harness import RankPool
from tests.example.test_two_ranks import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor instead and we are deprecating:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def walked(base: float, warmup: int, start: int, decay: int) -> Iterator[float]:
    """Step after step, as a scheduler that remembers what it set last."""
    last = base
    step = 0
    while True:
        step += 1
        if step < warmup:
            yield base * (1.0 - (warmup - step) / warmup)
        elif decay and start <= step < start + decay:
            last = max(1e-7, base * ((decay - (step - start)) / decay) ** 2)
            yield last
        else:
            yield last


@pytest.mark.parametrize(
    ("warmup", "start", "decay"),
    [(0, 0, 0), (1, 0, 0), (7, 0, 0), (0, 0, 10), (5, 5, 10), (5, 12, 3), (0, 4, 1), (2750, 49315, 27772)],
)
@pytest.mark.parametrize("base", [0.005, 15.0, 2e-7])
def test_learning_rates(base: float, warmup: int, start: int, decay: int) -> None:
    schedule = LearningRateSchedule(base=base, warmup_steps=warmup, decay_start=start, decay_steps=decay)
    num_steps = start + decay + warmup + 5
    expected = torch.tensor(list(islice(walked(base, warmup, start, decay), num_steps)), dtype=torch.float64)
    found = torch.tensor([schedule.at(step) for step in range(1, num_steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


SCHEDULE = {"learning_rate": 0.3, "lr_warmup_steps": 4, "lr_decay_start": 6, "lr_decay_steps": 5}
EPS = 1e-3  # so large that leaving it out shows


def reference_step(optimizer: str, weight: torch.nn.Parameter, sums: dict[int, Tensor], lr: float) -> None:
    """One step by the definition of the optimizer; then the gradient is dropped."""
    gradient = weight.grad
    assert gradient is not None
    if optimizer != "sgd":
        squares = gradient**2 if optimizer == "adagrad" else (gradient**2).mean(1, keepdim=True)
        sums[id(weight)] = sums.get(id(weight), 0) + squares
        gradient = gradient / (sums[id(weight)].sqrt() + EPS)
    weight.data -= lr * gradient
    weight.grad = None


def reference(config: TrainConfig, rows: int) -> dict[str, Tensor]:
    """Weights after the training, in float64, by plain autograd on one table of rows after the other."""
    dataset = DATASETS[config.dataset_name](config.data_path)
    torch.manual_seed(config.seed)
    model = copy.deepcopy(build_model(plan_tables(dataset.info, config), dataset.info, config)).double()
    loader = dataset.loader(
        "train", batch_size=rows, limit_batches=config.limit_train_batches, shuffle_seed=config.seed
    )
    codebooks = {id(weight) for weight in model.model.sparse_arch.embedding_bag_collection.codebook_parameters()}
    learning_rates = walked(config.learning_rate, 4, 6, 5)
    sums: dict[int, Tensor] = {}
    for epoch in range(1, config.epochs + 1):
        for batch in loader.epoch(epoch):
            lr = next(learning_rates)
            logits = model.model(batch.dense_features.double(), batch.sparse_features).squeeze(1)
            torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.double()).backward()
            for weight in model.parameters():
                of_dense = "adagrad" if config.adagrad else "sgd"
                reference_step(config.embedding_optimizer if id(weight) in codebooks else of_dense, weight, sums, lr)
    return model.state_dict()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("method", ["full", "cce"])
@pytest.mark.parametrize(
    ("embedding_optimizer", "adagrad"), [("rowwise_adagrad", True), ("adagrad", False), ("sgd", False), ("sgd", True)]
)
def test_weights_of_a_scheduled_run(
    embedding_optimizer: str,
    adagrad: bool,
    method: str,
    num_ranks: int,
    small_config: Callable[..., TrainConfig],
    ranks2: RankPool,
) -> None:
    """Of tables in fused kernels and of codebooks that ranks replicate alike; re-clusterings are left out."""
    optimizers = {"embedding_optimizer": embedding_optimizer, "adagrad": adagrad, "eps": EPS}
    sizes = {"batch_size": 64 // num_ranks, "checkpoint_every_epochs": 2, "checkpoint_best": False}
    compression = {"method": method, "compression": 1.0 if method == "full" else 4.0, "recluster_count": 0}
    config = small_config(**SCHEDULE, **optimizers, **sizes, **compression)
    expected = reference(config, rows=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if num_ranks == 1:
            run(0, 1, config)
        else:
            ranks2.run(run, config)
    dataset = DATASETS[config.dataset_name](config.data_path)
    found = build_model(plan_tables(dataset.info, config), dataset.info, config)
    load_checkpoint(Path(config.run_dir) / "checkpoints" / "step_12", found)
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=2e-4, atol=2e-5)
