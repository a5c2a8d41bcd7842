"""Which runs are made: the methods and budgets that are reported, and the levers that are tried one at a time."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.quality.gmf import FROM_TRAINED, Settings
from benchmarks.quality.trials import TRIALS
from cce_torchrec import METHODS

SEEDS = (1, 2, 3)
LEVER_SEEDS = tuple(range(1, 11))  # as many as there are of them
# 2^6, 2^7, .. parameters a dimension a table, with two tables of 32 dims.
BUDGETS = {
    "ml-100k": tuple(64 << i for i in range(6, 11)),
    "gowalla": tuple(64 << i for i in range(6, 13)),
}
EPOCHS = {"ml-100k": 30, "gowalla": 6}
FULL = "full"
# Settings chosen on the split "tune", said in full though some are defaults, and what those are compared with.
VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"method": "ce", "options": {"num_columns": 8}},
    "ce_4_columns": {"method": "ce", "options": {"num_columns": 4}},
    "ce_32_columns": {"method": "ce", "options": {"num_columns": 32}},
    "robe": {"method": "robe", "options": {"block_size": 4}},
    "robe_blocks_of_32": {"method": "robe", "options": {"block_size": 32}},
    "hashed_net_unsigned": {"method": "hashed_net", "options": {"signed": False}},
    "hashing_trick_blocks": {"method": "hashing_trick", "options": {"assignments": "blocks"}},
    "ce_blocks": {"method": "ce", "options": {"num_columns": 8, "assignments": "blocks"}},
    "residual_cce": {"method": "residual_cce", "options": {"num_columns": 4}},
    "cce_hot_ids": {"method": "cce", "hot_part": 0.25},
}
METHOD_NAMES = tuple(dict.fromkeys([*METHODS, *FROM_TRAINED, *VARIANTS]))

# What the levers change one at a time: CCE as it was when they were tried, which led to the defaults of today.
LEVER_BASE: dict[str, Any] = {"method": "cce", "gradient_step": 1.0, "gradient_damping": 1.0}


def _levels(num_levels: int, num_columns: int = 8) -> dict[str, Any]:
    return {"method": "residual_cce", "options": {"num_columns": num_columns, "num_levels": num_levels}}


LEVERS: dict[str, dict[str, Any]] = {
    "the base": {},
    "hashes at the start": {"initial_assignments": "hash"},
    "hashes at the start, no gradients": {"initial_assignments": "hash", "gradient_steps": 0},
    "hot ids: 1/8 of the rows": {"hot_part": 0.125},
    "hot ids: 1/4 of the rows": {"hot_part": 0.25},
    "hot ids: 1/2 of the rows": {"hot_part": 0.5},
    "2 columns": {"options": {"num_columns": 2}},
    "4 columns": {"options": {"num_columns": 4}},
    "16 columns": {"options": {"num_columns": 16}},
    "no re-clustering": {"recluster_count": 0},
    "no gradients": {"gradient_steps": 0},
    "gradients of 10 steps": {"gradient_steps": 10},
    "gradients of all steps": {"gradient_steps": 1_000_000},
    "gradients of 30 steps": {"gradient_steps": 30},
    "gradient step 0.5": {"gradient_step": 0.5},
    "gradient step 2": {"gradient_step": 2.0},
    "gradient step 3": {"gradient_step": 3.0},
    "gradient damping 0.3": {"gradient_damping": 0.3},
    "gradient damping 3": {"gradient_damping": 3.0},
    "gradient step 2, damping 2": {"gradient_step": 2.0, "gradient_damping": 2.0},
    "gradient step 2, damping 4": {"gradient_step": 2.0, "gradient_damping": 4.0},
    "gradient step 3, damping 3": {"gradient_step": 3.0, "gradient_damping": 3.0},
    "1 re-clustering": {"recluster_count": 1},
    "3 re-clusterings": {"recluster_count": 3},
    "12 re-clusterings": {"recluster_count": 12},
    "24 re-clusterings": {"recluster_count": 24},
    "the last at 0.5": {"recluster_stop": 0.5},
    "the last at 1": {"recluster_stop": 1.0},
    "start where ids are, not from the mean": {"start_from_mean": False},
    "optimizer state reset": {"optimizer_state": "reset"},
    "both of these": {"start_from_mean": False, "optimizer_state": "reset"},
    "helper: 1/8 of the rows": {"helper_part": 0.125},
    "helper: 1/4 of the rows": {"helper_part": 0.25},
    "helper: 3/4 of the rows": {"helper_part": 0.75},
    "ids weigh their counts": {"id_weights": "counts"},
    "ids weigh the roots of their counts": {"id_weights": "roots"},
    "3 levels": _levels(3),
    "3 levels, 4 columns": _levels(3, num_columns=4),
    "3 levels, 4 columns, gradient step 2, damping 2": {
        **_levels(3, num_columns=4),
        "gradient_step": 2.0,
        "gradient_damping": 2.0,
    },
    "4 levels": _levels(4),
    "6 levels": _levels(6),
    "8 levels": _levels(8),
    "12 levels": _levels(12),
    "6 levels, 4 columns": _levels(6, num_columns=4),
    "6 levels, 12 re-clusterings": {**_levels(6), "recluster_count": 12},
    "6 levels, no re-clustering": {**_levels(6), "recluster_count": 0},
    "learning rate 0.003": {"learning_rate": 0.003},
    "6 levels, learning rate 0.003": {**_levels(6), "learning_rate": 0.003},
    "a full table": {"method": "full", "params": None},
    "a full table, learning rate 0.003": {"method": "full", "params": None, "learning_rate": 0.003},
    "budget in proportion to ids": {"share": "proportion"},
    "initial std 0.003": {"init_std": 0.003},
    "initial std 0.01": {"init_std": 0.01},
    "initial std 0.1": {"init_std": 0.1},
}
# Each trial, and one with more re-clusterings than else.
TRIED: dict[str, dict[str, Any]] = {
    **{name: {"trial": name} for name in TRIALS if name is not None},
    "one iteration from the codebooks, 24 times": {"trial": "one iteration from the codebooks", "recluster_count": 24},
}
LEVER_BUDGETS = {"ml-100k": (4_096, 16_384, 65_536), "gowalla": (65_536, 262_144)}


def reported(dataset: str, methods: Iterable[str], params: Iterable[int], seeds: Iterable[int]) -> Iterator[Settings]:
    """The runs of the tables of results: seed by seed, so that all methods have one before any has two."""
    for seed in seeds:
        for method in methods:
            for budget in [None] if method == FULL else params:
                yield reported_settings(dataset, method, budget, seed)


def reported_settings(dataset: str, method: str, params: int | None, seed: int) -> Settings:
    changes = {"method": method, **VARIANTS.get(method, {})}
    return Settings(dataset=dataset, split="report", params=params, seed=seed, epochs=EPOCHS[dataset], **changes)


def levers(dataset: str, names: Iterable[str], params: Iterable[int], seeds: Iterable[int]) -> list[Settings]:
    """The runs of the table of levers, seed by seed."""
    runs = (lever_settings(dataset, name, budget, seed) for seed in seeds for name in names for budget in params)
    return list({str(settings): settings for settings in runs}.values())  # a full table has no budget


def lever_settings(dataset: str, name: str, params: int, seed: int) -> Settings:
    changes = {**LEVER_BASE, "params": params, **LEVERS[name]}
    return Settings(dataset=dataset, split="tune", seed=seed, epochs=EPOCHS[dataset], **changes)


def trials(dataset: str, params: Iterable[int], seeds: Iterable[int]) -> list[Settings]:
    """The runs of the table of trials, seed by seed."""
    return [trial_settings(dataset, name, budget, seed) for seed in seeds for name in TRIED for budget in params]


def trial_settings(dataset: str, name: str, params: int, seed: int) -> Settings:
    changes = {"method": "cce", "params": params, **TRIED[name]}
    return Settings(dataset=dataset, split="tune", seed=seed, epochs=EPOCHS[dataset], **changes)
