"""Presets: the flags of known trainings, each a YAML file of `dlrm_example/presets/` or one of your own.

A file has a line `about:` and flags without their dashes. What flags are given on the command line wins.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dlrm_example.config import TrainConfig, UsageError

LIST = "list"
ABOUT = "about"
SHIPPED = files("dlrm_example") / "presets"
OF_ONE_RUN = ("run_dir", "resume", "overwrite")
SIZES = ("compression", "max_params_per_table", "budget_bytes")
EXCLUSIVE = (("batch_size", "global_batch_size"), SIZES)  # of which a run has one


def read_preset(name: str) -> dict[str, Any]:
    """The flags of a shipped preset, or of a file whose name ends with `.yaml`.

    Raises:
        UsageError: there is no such preset, or it has a key that is no flag of `dlrm_example.train`.
    """
    flags = {key: value for key, value in _loaded(name).items() if key != ABOUT}
    unknown = [key for key in flags if key not in TrainConfig.__dataclass_fields__]
    if unknown:
        raise UsageError(f"--preset {name}: {', '.join(map(str, unknown))} is no flag of dlrm_example.train")
    of_one_run = [key for key in flags if key in OF_ONE_RUN]
    if of_one_run:
        raise UsageError(f"--preset {name}: {', '.join(of_one_run)} is of one run, and no setting to share")
    return flags


def preset_names() -> list[str]:
    """Those that are shipped."""
    return sorted(path.name.removesuffix(".yaml") for path in SHIPPED.iterdir() if path.name.endswith(".yaml"))


def described_presets() -> str:
    """A line for each that is shipped."""
    names = preset_names()
    width = max(map(len, names))
    return "\n".join(f"{name:{width}}  {_loaded(name)[ABOUT]}" for name in names)


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    arguments: list[str] = []
    for key, value in flags.items():
        if isinstance(value, bool):
            arguments.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, Mapping):
            arguments += [f"--{key}", *(f"{name}={each}" for name, each in value.items())]
        elif isinstance(value, list | tuple):
            arguments += [f"--{key}", ",".join(map(str, value))]
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def as_preset(values: Mapping[str, Any]) -> str:
    """All settings as the text of a preset's file."""
    losers = {group[0] for group in EXCLUSIVE if any(values[name] is not None for name in group[1:])}
    left_out = {*losers, *OF_ONE_RUN}
    shown = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in left_out and value is not None and value != {}
    }
    return yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=120)


def without_replaced(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's flags but those that a given one stands in for, such as its size of a batch where another is given."""
    replaced = {name for group in EXCLUSIVE if not given.keys().isdisjoint(group) for name in group}
    if "method" in given:
        replaced |= {"method_options", *(SIZES if given["method"] == "full" else ())}
    return {key: value for key, value in preset.items() if key not in replaced}


def _loaded(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".yaml") else SHIPPED / f"{name}.yaml"
    if not path.is_file():
        own = "give the path of a file that ends with .yaml, or one of"
        raise UsageError(f"--preset {name!r} is unknown; {own} {', '.join(preset_names())}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--preset {name} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--preset {name} must have lines such as embedding_dim: 16")
    return content
