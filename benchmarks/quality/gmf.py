"""One training of generalised matrix factorisation: P(click) = sigmoid( user vector . item vector )."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc
from torchrec import KeyedJaggedTensor

from benchmarks.quality.data import Clicks, Rows, Split, renumbered
from benchmarks.quality.lookups import use_cheap_gradients
from benchmarks.quality.trials import TRIALS, Trial
from cce_torchrec import (
    METHODS,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingBagConfig,
    ReclusterConfig,
    ReclusterSchedule,
    compress,
)
from cce_torchrec.memory import stored_bytes
from cce_torchrec.methods import CCE, FullTable, MethodConfig
from cce_torchrec.methods.blocks import Assignments

FEATURES = ("user", "item")
EVAL_BATCH = 65_536
# "pq" cuts down a full table that was trained; "pq_tuned" trains the result on.
FROM_TRAINED = {"pq": "pq", "pq_tuned": "pq"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a run; two runs with equal settings are the same run.

    Attributes:
        dataset: of the clicks.
        split: "report" or "tune".
        method: a key of ``METHODS`` or of ``FROM_TRAINED``; of ``PUBLISHED`` for :mod:`benchmarks.quality.published`.
        params: the budget of both tables together; ``None`` for full tables.
        seed: of initial weights, order and hashes.
        options: fields of the method to fix, beside the budget.
        helper_part: which part of a table's rows are CCE's helper rows; ``None`` for the method's default.
        share: how the budget is shared out: "equal" parts, or in "proportion" to the tables' ids.
        init_std: standard deviation of initial vectors.
        epochs: at most.
        recluster_count: re-clusterings in the first ``recluster_stop`` of all epochs.
        recluster_stop: as a fraction of ``epochs``.
        optimizer_state: of re-clustered rows.
        gradient_steps: before each re-clustering, whose gradients steer it; 0 for none.
        gradient_step: the rate at which they do.
        gradient_damping: of steps of ids that were hardly seen.
        start_from_mean: whether the first re-clustering takes the vectors that hashes made for their mean.
        id_weights: of ids in a re-clustering: all 1, counts in the training part, or the roots of those.
        hot_part: which part of a table's rows are hot ids' own, where the method has such.
        warm_part: which part of a table's ids have stored assignments, those of the largest weights; ``None`` for all.
        initial_assignments: of ids until the first re-clustering, where the method has a choice.
        renumbered: whether ids are numbered at random, not as they come.
        trial: a change that is no setting, of :mod:`benchmarks.quality.trials`.
    """

    dataset: str
    split: Split
    method: str
    params: int | None
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    helper_part: float | None = None
    share: Literal["equal", "proportion"] = "equal"
    init_std: float = 0.03
    epochs: int = 30
    recluster_count: int = ReclusterSchedule.count
    recluster_stop: float = ReclusterSchedule.stop_after_fraction
    optimizer_state: Literal["reset", "carry"] = ReclusterConfig.optimizer_state
    gradient_steps: int = ReclusterSchedule.gradient_steps
    gradient_step: float = ReclusterConfig.gradient_step
    gradient_damping: float = ReclusterConfig.gradient_damping
    start_from_mean: bool = ReclusterConfig.start_from_mean
    id_weights: Literal["ones", "counts", "roots"] = "ones"
    hot_part: float = 0.0
    warm_part: float | None = None
    initial_assignments: Assignments = CCE.initial_assignments
    renumbered: bool = False
    trial: str | None = None
    dim: int = 32
    batch_size: int = 4096
    learning_rate: float = 1e-3


class GMF(nn.Module):
    """The logit of a click: the dot product of a user's and an item's vector."""

    def __init__(self, tables: list[CompressedEmbeddingBagConfig]) -> None:
        super().__init__()
        self.collection = CompressedEmbeddingBagCollection(tables=tables)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        vectors = self.collection(ids).to_dict()
        return (vectors["user"] * vectors["item"]).sum(dim=1)


def budgets(settings: Settings, sizes: tuple[int, int]) -> list[int]:
    """The parameters of each table; none gets more than a full table has."""
    assert settings.params is not None
    total = len(sizes) if settings.share == "equal" else sum(sizes)
    parts = [1 if settings.share == "equal" else size for size in sizes]
    return [min(settings.params * part // total, size * settings.dim) for part, size in zip(parts, sizes, strict=True)]


def methods_of(settings: Settings, sizes: tuple[int, int]) -> list[MethodConfig]:
    """The method of each table."""
    if settings.params is None:
        return [FullTable(), FullTable()]
    method = METHODS[FROM_TRAINED.get(settings.method, settings.method)]
    options = {**settings.options, **({"seed": settings.seed} if "seed" in method.__dataclass_fields__ else {})}
    methods = []
    for size, budget in zip(sizes, budgets(settings, sizes), strict=True):
        if settings.helper_part is not None:
            options["num_helper_rows"] = max(1, round(budget // settings.dim * settings.helper_part))
        if "num_hot_ids" in method.__dataclass_fields__:
            options["num_hot_ids"] = int(budget // settings.dim * settings.hot_part)
        if "initial_assignments" in method.__dataclass_fields__:
            options["initial_assignments"] = settings.initial_assignments
        if settings.warm_part is not None:
            options["num_assigned_ids"] = max(1, round(size * settings.warm_part))
        methods.append(method.from_budget(size, settings.dim, budget, **options))
    return methods


def tables_of(
    settings: Settings, sizes: tuple[int, int], methods: list[MethodConfig]
) -> list[CompressedEmbeddingBagConfig]:
    return [
        CompressedEmbeddingBagConfig(
            name=f"t_{feature}",
            num_embeddings=size,
            embedding_dim=settings.dim,
            feature_names=[feature],
            init_fn=partial(nn.init.normal_, std=settings.init_std),
            method=method,
        )
        for feature, size, method in zip(FEATURES, sizes, methods, strict=True)
    ]


def packed_bytes(settings: Settings, sizes: tuple[int, int], methods: list[MethodConfig]) -> int:
    """All bytes, were assignments stored as bits."""
    packed = [replace(method, bit_packed=True) if hasattr(method, "bit_packed") else method for method in methods]
    return sum(stored_bytes(method, size, settings.dim) for method, size in zip(packed, sizes, strict=True))


def as_ids(rows: Rows) -> KeyedJaggedTensor:
    """One user and one item a row."""
    values = torch.cat([rows.users_N, rows.items_N])
    return KeyedJaggedTensor(keys=list(FEATURES), values=values, lengths=torch.ones(len(values), dtype=torch.int32))


@torch.no_grad()
def evaluate(model: GMF, rows: Rows, batches: list[KeyedJaggedTensor]) -> tuple[float, float]:
    """BCE in nats a row, and AUC."""
    logits_N = torch.cat([model(ids) for ids in batches])
    bce = binary_cross_entropy_with_logits(logits_N.double(), rows.labels_N.double())
    return float(bce), float(binary_auroc(logits_N, rows.labels_N.int()))


@dataclass
class History:
    """Scores epoch by epoch, and the best of them."""

    scores: list[tuple[float, float]] = field(default_factory=list)

    def add(self, bce: float, auc: float) -> bool:
        """Whether to stop: worse than the best so far by a hundredth, in both."""
        self.scores.append((bce, auc))
        return bce > 1.01 * self.best_bce and 1.01 * auc < self.best_auc

    @property
    def best_bce(self) -> float:
        return min(bce for bce, _ in self.scores)

    @property
    def best_auc(self) -> float:
        return max(auc for _, auc in self.scores)


def run(settings: Settings, clicks: Clicks) -> dict[str, Any]:
    """Train and score; where the budget is too small for the method, the record says so instead."""
    started = time.perf_counter()
    sizes = (clicks.num_users, clicks.num_items)
    try:
        methods = methods_of(settings, sizes)
    except ValueError as error:
        return {"settings": asdict(settings), "does_not_fit": str(error)}
    if settings.renumbered:
        clicks = renumbered(clicks)
    torch.manual_seed(settings.seed)
    is_fitted = settings.method in FROM_TRAINED and settings.params is not None
    first = [FullTable(), FullTable()] if is_fitted else methods
    trial = TRIALS[settings.trial]()
    model, clicks = GMF(trial.tables(tables_of(settings, sizes, first))), trial.clicks(clicks)
    with trial.training(model):
        history, reclusterings = train(settings, model, clicks, trial)
    if is_fitted:
        compress(model, dict(zip(("t_user", "t_item"), methods, strict=True)), from_trained=True, seed=settings.seed)
        history = History([evaluate(model, clicks.held_out, eval_batches(clicks))])
        if settings.method == "pq_tuned":
            history.scores += train(settings, model, clicks, trial)[0].scores
    sizes_report = model.collection.memory_report().total
    return {
        "settings": asdict(settings),
        "best_bce": history.best_bce,
        "best_auc": history.best_auc,
        "scores": history.scores,
        "params": sizes_report.num_params,
        "codebook_bytes": sizes_report.codebook_bytes,
        "total_bytes": sizes_report.codebook_bytes + sizes_report.assignment_bytes,
        "packed_bytes": packed_bytes(settings, sizes, methods),
        "reclusterings": reclusterings,
        "seconds": round(time.perf_counter() - started, 2),
    }


def eval_batches(clicks: Clicks) -> list[KeyedJaggedTensor]:
    """The ids of what is held out."""
    return [as_ids(clicks.held_out[slice(i, i + EVAL_BATCH)]) for i in range(0, len(clicks.held_out), EVAL_BATCH)]


def batches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[tuple[KeyedJaggedTensor, Tensor]]:
    """An epoch in a random order."""
    for index_B in torch.randperm(len(rows), generator=generator).split(size):
        batch = rows[index_B]
        yield as_ids(batch), batch.labels_N


def train(settings: Settings, model: GMF, clicks: Clicks, trial: Trial) -> tuple[History, int]:
    """Train until the early stop or the last epoch; the model is left with the weights of its best epoch."""
    use_cheap_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    steps_an_epoch = -(-len(clicks.train) // settings.batch_size)
    schedule = _schedule(settings, model, steps_an_epoch * settings.epochs)
    id_weights = _id_weights(settings, clicks)
    held_out = eval_batches(clicks)
    history, step, reclusterings, best = History(), 0, 0, {}
    for _ in range(settings.epochs):
        for ids, labels_B in batches(clicks.train, settings.batch_size, generator):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(ids), labels_B).backward()
            optimizer.step()
            step += 1
            is_reclustered = schedule is not None and bool(
                schedule.step(step, model, optimizer=optimizer, id_weights=id_weights)
            )
            reclusterings += is_reclustered
            trial.after_step(optimizer, settings.learning_rate, is_reclustered)
        stop = history.add(*evaluate(model, clicks.held_out, held_out))
        if history.scores[-1][0] == history.best_bce:
            best = {name: value.clone() for name, value in model.state_dict().items()}
        if stop:
            break
    model.load_state_dict(best)
    return history, reclusterings


def _schedule(settings: Settings, model: GMF, total_steps: int) -> ReclusterSchedule | None:
    """When to re-cluster, and how; never where a method learns no assignments."""
    is_learned = any(config.method.reclusterable for config in model.collection.embedding_bag_configs())
    if not is_learned or settings.recluster_count == 0:
        return None
    config = ReclusterConfig(
        optimizer_state=settings.optimizer_state,
        gradient_step=settings.gradient_step,
        gradient_damping=settings.gradient_damping,
        start_from_mean=settings.start_from_mean,
    )
    return ReclusterSchedule(
        total_steps=total_steps,
        count=settings.recluster_count,
        stop_after_fraction=settings.recluster_stop,
        gradient_steps=settings.gradient_steps,
        seed=settings.seed,
        config=config,
    )


def _id_weights(settings: Settings, clicks: Clicks) -> dict[str, Tensor] | None:
    if settings.id_weights == "ones":
        return None
    counts = {
        "t_user": torch.bincount(clicks.train.users_N, minlength=clicks.num_users),
        "t_item": torch.bincount(clicks.train.items_N, minlength=clicks.num_items),
    }
    power = {"counts": 1.0, "roots": 0.5}[settings.id_weights]
    return {name: count.double() ** power for name, count in counts.items()}
