"""Finished runs: a file of JSON lines that grows, and the JSON file that is published."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, ROOT
from benchmarks.quality.data import load
from benchmarks.quality.gmf import Settings, run
from benchmarks.quality.plans import SEEDS
from benchmarks.quality.published import PUBLISHED as PUBLISHED_METHODS
from benchmarks.quality.published import run_published
from cce_torchrec import METHODS
from dlrm_example.provenance import provenance

Record = Mapping[str, Any]
NEW_RUNS = ROOT / "runs" / "quality.jsonl"
PUBLISHED = RESULTS / "quality.json"
POINTERS = RESULTS / "pointers.json"
# Whose defaults have changed since runs were published.
_OF_RECLUSTERINGS = ("optimizer_state", "start_from_mean", "gradient_step", "gradient_damping")
_OF_THE_START = ("initial_assignments",)  # and that of some methods
_BEFORE = {"start_from_mean": False, "initial_assignments": "hash", "gradient_step": 1.0, "gradient_damping": 1.0}


def records(path: Path = NEW_RUNS, published: Path = PUBLISHED) -> list[Record]:
    """All finished runs: those published there, then new ones; each once."""
    made: list[Record] = []
    if published.exists():
        content = json.loads(published.read_text())
        made += [{**record, "made_by": content["made_by"][record["made_by"]]} for record in content["runs"]]
    if path.exists():
        made += [json.loads(line) for line in path.read_text().splitlines()]
    return list({key_of_run(record): record for record in made}.values())


def found(runs: Sequence[Record], settings: Callable[[int], Settings], seeds: Iterable[int] = SEEDS) -> list[Record]:
    """The runs of the seeds that are there."""
    by_settings = {key_of_run(run): run for run in runs if "does_not_fit" not in run}
    keys = [key_of_settings(settings(seed)) for seed in seeds]
    return [by_settings[key] for key in keys if key in by_settings]


def publish(runs: list[Record], path: Path = PUBLISHED) -> None:
    """Write the published file: a line a run, what made them said once."""
    made_by = list({key_of(run["made_by"]): run["made_by"] for run in runs}.values())
    lines = [json.dumps({**run, "made_by": made_by.index(run["made_by"])}) for run in runs]
    facts = ",\n".join(map(json.dumps, made_by))
    path.write_text(f'{{"made_by": [\n{facts}\n],\n"runs": [\n' + ",\n".join(lines) + "\n]}\n")


def key_of(values: Mapping[str, Any]) -> str:
    """What equal settings have in common."""
    return json.dumps(values, sort_keys=True)


def key_of_settings(settings: Settings) -> str:
    """What equal settings have in common; some make no difference to methods that learn no assignments."""
    values = asdict(settings)
    method = METHODS.get(settings.method)
    if method is None or not method.reclusterable:
        values = {name: value for name, value in values.items() if name not in _OF_RECLUSTERINGS}
    if method is None or not set(_OF_THE_START) & method.__dataclass_fields__.keys():
        values = {name: value for name, value in values.items() if name not in _OF_THE_START}
    return key_of(values)


def key_of_run(run: Record) -> str:
    """:func:`key_of_settings`; those that a run did not know of are as they were then, or at their defaults."""
    return key_of_settings(Settings(**{**_BEFORE, **run["settings"]}))


def run_missing(plan: Iterable[Settings], paths: Mapping[str, str | None], jobs: int, path: Path = NEW_RUNS) -> None:
    """Make the runs of a plan that are not finished, ``jobs`` at a time, each on one thread; in the plan's order."""
    finished = {key_of_run(record) for record in [*records(path), *records(path, POINTERS)]}
    missing = [settings for settings in plan if key_of_settings(settings) not in finished]
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = provenance()
    print(f"{len(missing)} runs to make", flush=True)
    with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool, path.open("a") as file:
        for record in pool.imap_unordered(_run, [(settings, dict(paths)) for settings in missing]):
            file.write(json.dumps({**record, "made_by": made_by}) + "\n")
            file.flush()
            told = {name: value for name, value in record["settings"].items() if name in ("method", "params", "seed")}
            print(*told.values(), record["settings"]["options"], record.get("best_bce", "does not fit"), flush=True)


_loaded: dict[tuple[str, str], Any] = {}


def _run(task: tuple[Settings, dict[str, str | None]]) -> Record:
    settings, paths = task
    key = (settings.dataset, settings.split)
    if key not in _loaded:
        _loaded.clear()  # one data set in memory is enough
        _loaded[key] = load(*key, paths[settings.dataset])
    make = run_published if settings.method in PUBLISHED_METHODS else run
    return make(settings, _loaded[key])
