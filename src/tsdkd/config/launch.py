"""Options for starting the processes of a run, and accelerate's launch configurations, shipped or a user's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, first_line
from ..files import read_small_file
from .coercion import coerce, shorten
from .options import AT_LEAST_ONE, option
from .yaml_file import MAX_BYTES, load_yaml

_CONFIGS = resources.files("tsdkd").joinpath("configs/accelerate")
_COUNTS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}  # name -> least
LAUNCHED = "TSDKD_LAUNCHED"  # in the environment of the processes that are started here: how many they are


def launch_config_names() -> list[str]:
    """The launch configurations that ship with tsdkd."""
    return sorted(path.name.removesuffix(".yaml") for path in _CONFIGS.iterdir())


@dataclass
class LaunchArguments:
    """Options for starting a run's processes."""

    accelerate_config: str | None = option(
        None,
        "A launch configuration of accelerate.",
        (
            lambda v: _launch_config_path(v) is not None,
            f"must be a file, or one of {', '.join(launch_config_names())}",
        ),
    )
    num_processes: int | None = option(None, "Processes in all; none: one a visible GPU.", AT_LEAST_ONE)


def find_launch_config(config: str) -> Path:
    """A file, or a shipped configuration. Raises `ConfigError`."""
    path = _launch_config_path(config)
    if path is None:
        raise ConfigError([f"accelerate_config: no file {config!r}, and none of {', '.join(launch_config_names())}"])
    return path


def read_launch_config(config: str | None) -> dict[str, Any]:
    """The values of a launch configuration; empty if there is none. Raises `ConfigError`."""
    if config is None:
        return {}
    path = find_launch_config(config)
    try:
        values = load_yaml(path)
    except ValueError as error:
        raise ConfigError([f"accelerate_config: {path} can't be read: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"accelerate_config: {path} must hold a mapping, found {type(values).__name__}"])
    _check_deepspeed_file(path, values)
    return values | _coerce_counts(path, values)


def _check_deepspeed_file(path: Path, values: Mapping[str, Any]) -> None:
    """Accelerate and DeepSpeed would wait for a pipe, and for the end of a device."""
    deepspeed = values.get("deepspeed_config")
    file = deepspeed.get("deepspeed_config_file") if isinstance(deepspeed, dict) else None
    if not isinstance(file, str) or not Path(file).exists():
        return
    try:
        json.loads(read_small_file(Path(file), MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"accelerate_config: {path}: {file} can't be read: {first_line(error)}"]) from error


def _coerce_counts(path: Path, values: Mapping[str, Any]) -> dict[str, int]:
    counts, problems = {}, []
    for name, least in _COUNTS.items():
        if values.get(name) is None:
            continue
        try:
            counts[name] = coerce(values[name], int)
        except ValueError:
            counts[name] = -1
        if counts[name] < least:
            expected = f"a whole number of at least {least}"
            problems.append(f"accelerate_config: {path}: {name} must be {expected}, found {shorten(values[name])}")
    if problems:
        raise ConfigError(problems)
    return counts


def launch_num_processes(config: str, options: Mapping[str, Any]) -> int:
    """Number of processes that a launch configuration starts with these options of `accelerate launch`, on all
    machines."""
    return int(options.get("num_processes") or read_launch_config(config).get("num_processes") or 1)


def _launch_config_path(config: str) -> Path | None:
    shipped = _CONFIGS.joinpath(f"{config}.yaml")
    return next((path for path in (Path(config), Path(str(shipped))) if path.is_file()), None)
