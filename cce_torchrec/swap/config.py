"""The file that says what is swapped in: YAML.

rules:                        # first match wins; unmatched tables stay full
- min_num_embeddings: 5000  # or tables: a regular expression over table names; or both
method: cce
compression: 16           # or num_params: N, or budget_bytes: N; or the method's own fields under options:
recluster: {every_steps: 5000, stop_after_fraction: 0.8}   # optional; epochs: N, or total_steps: N, make the fraction exact
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import yaml

from cce_torchrec.methods.base import check_positive
from cce_torchrec.recluster import ReclusterConfig, ReclusterSchedule
from cce_torchrec.swap.rules import CompressionRule

_SCHEDULE = ("every_steps", "count", "total_steps", "stop_after_fraction", "gradient_steps", "background_steps", "seed")
_EPOCHS = "epochs"  # how many the script trains


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """What to do to a script.

    Attributes:
        rules: which tables are compressed; of several that match a table, the first counts.
        schedule: when to re-cluster; ``None`` for never.
        epochs: that the script trains, where the schedule has no ``total_steps``; ``None`` where that is not known.
    """

    rules: tuple[CompressionRule, ...]
    schedule: ReclusterSchedule | None
    epochs: int | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ValueError: where it is no such file: it names the key and the keys there are.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML: {error}") from None
        try:
            data = _section(data, "the file", ("rules", "recluster"))
            rules = data.get("rules")
            if not isinstance(rules, list) or not rules:
                raise ValueError(f"rules is {rules!r}, not a list with a rule or more.")
            schedule, epochs = data.get("recluster"), None
            if schedule is not None:
                schedule, epochs = _schedule(schedule)
            return cls(
                rules=tuple(_rule(rule, number) for number, rule in enumerate(rules, 1)),
                schedule=schedule,
                epochs=epochs,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _section(data: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} is {data!r}, not a mapping with the keys {', '.join(known)}.")
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; the keys are {', '.join(known)}.")
    return data


def _rule(data: Any, number: int) -> CompressionRule:
    data = _section(data, f"rule {number}", tuple(field.name for field in fields(CompressionRule)))
    if "method" not in data:
        raise ValueError(f"rule {number} has no method: add one, such as method: cce.")
    try:
        return CompressionRule(**data)
    except ValueError as error:
        raise ValueError(f"rule {number}: {error}") from None


def _schedule(data: Any) -> tuple[ReclusterSchedule, int | None]:
    """The schedule, and how many epochs it is for."""
    options = tuple(field.name for field in fields(ReclusterConfig))
    data = _section(data, "recluster", (*_SCHEDULE, _EPOCHS, *options))
    if "every_steps" not in data and "total_steps" not in data:
        raise ValueError("recluster needs every_steps, or total_steps with a count.")
    for one, other in (("every_steps", "count"), ("total_steps", _EPOCHS)):
        if one in data and other in data:
            raise ValueError(f"recluster has {one}={data[one]} and {other}={data[other]}: give one.")
    epochs = data.get(_EPOCHS)
    if epochs is not None:
        check_positive(epochs=epochs)
    config = ReclusterConfig(**{name: data[name] for name in options if name in data})
    schedule = {"total_steps": None, **{name: data[name] for name in _SCHEDULE if name in data}}
    return ReclusterSchedule(**schedule, config=config), epochs
