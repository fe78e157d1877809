"""Reads keys and raw values from a flat YAML file and from command-line flags. Doesn't import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.coercion import did_you_mean
from ..config.yaml_file import load_yaml
from ..errors import ConfigError
from .presets import find_preset, preset_names


def read_yaml(config: str) -> dict[str, Any]:
    """The flat mapping in a YAML file.

    Raises:
        ConfigError: missing, not a mapping, or what `load_yaml` refuses.
    """
    try:
        path = Path(config) if Path(config).exists() else find_preset(config)
        if path is None:
            hint = did_you_mean(config.removesuffix(".yaml"), preset_names())
            raise ConfigError(
                [f"--config: no such file or shipped configuration: {config!r}{hint}; see `tsdkd configs`"]
            )
        loaded = load_yaml(path)
    except OSError as error:  # a name that no file can have
        raise ConfigError([f"--config: {config} can't be read: {error.strerror}"]) from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"--config: {config} can't be read: {error}"]) from error
    if not isinstance(loaded, dict):
        found = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError([f"--config: {config} must hold a mapping of keys to values, found {found}"])
    return loaded


def read_raw_values(config: str | None, flags: Sequence[str]) -> dict[str, Any]:
    """The unparsed values of a run's file and of the flags that override it. Raises `ConfigError`."""
    return {**(read_yaml(config) if config is not None else {}), **read_flags(flags, [])}


def flags_without_value(flags: Sequence[str]) -> set[str]:
    """The names of flags that no value follows."""
    return {
        word[2:].replace("-", "_")
        for word, after in zip(flags, [*flags[1:], "--"], strict=False)
        if word.startswith("--") and "=" not in word and after.startswith("--")
    }


def read_flags(flags: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `--key` (true) and `--key a b` (a list). Dashes count as underscores."""
    flag_values: dict[str, Any] = {}
    current: str | None = None
    for token in flags:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            current = name.replace("-", "_")
            flag_values[current] = [value] if equals else []
        elif current is None:
            hint = f"; did you mean --config {token}?" if token.endswith((".yaml", ".yml")) else ""
            problems.append(f"{token!r}: expected a --key before it{hint}")
        else:
            flag_values[current].append(token)
    return {k: True if not v else v[0] if len(v) == 1 else v for k, v in flag_values.items()}
