"""Options for starting the processes of a run; finds and reads accelerate launch configurations."""

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
_COUNTS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}  # name -> minimum
LAUNCHED = "TSDKD_LAUNCHED"  # environment variable of started processes: their number


def launch_config_names() -> list[str]:
    """Return the names of the launch configurations that ship with tsdkd."""
    return sorted(path.name.removesuffix(".yaml") for path in _CONFIGS.iterdir())


@dataclass
class LaunchArguments:
    """Options for starting a run's processes."""

    accelerate_config: str | None = option(
        None,
        "Launch configuration of accelerate.",
        (
            lambda v: _launch_config_path(v) is not None,
            f"must be a file or one of {', '.join(launch_config_names())}",
        ),
    )
    num_processes: int | None = option(None, "Total number of processes. Default: one per visible GPU.", AT_LEAST_ONE)


def find_launch_config(config: str) -> Path:
    """Return the path of a launch configuration, a file or a shipped name. Raises `ConfigError`."""
    path = _launch_config_path(config)
    if path is None:
        raise ConfigError(
            [f"accelerate_config: must be a file or one of {', '.join(launch_config_names())}, found {config!r}"]
        )
    return path


def read_launch_config(config: str | None) -> dict[str, Any]:
    """Return the values of a launch configuration; empty if `config` is None. Raises `ConfigError`."""
    if config is None:
        return {}
    path = find_launch_config(config)
    try:
        values = load_yaml(path)
    except ValueError as error:
        raise ConfigError([f"accelerate_config: {path} can't be read: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"accelerate_config: {path} must contain a mapping, found {type(values).__name__}"])
    _check_deepspeed_file(path, values)
    return values | _coerce_counts(path, values)


def _check_deepspeed_file(path: Path, values: Mapping[str, Any]) -> None:
    """Check the file here, because accelerate and DeepSpeed would block on a pipe or an endless device."""
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
    """Return the number of processes on all machines for a launch configuration and `accelerate launch` options."""
    return int(options.get("num_processes") or read_launch_config(config).get("num_processes") or 1)


def _launch_config_path(config: str) -> Path | None:
    shipped = _CONFIGS.joinpath(f"{config}.yaml")
    return next((path for path in (Path(config), Path(str(shipped))) if path.is_file()), None)
