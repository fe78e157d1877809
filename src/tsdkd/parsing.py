"""One flat YAML and command-line flags -> typed, checked arguments; all problems of both reported together."""

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig

from .checks import check_values, default_of
from .coercion import coerce, nearest
from .config import DataArguments, TokenSelectiveConfig
from .errors import ConfigError
from .launch import LaunchArguments
from .methods import METHODS
from .presets import find_preset, preset_names

_UNSUPPORTED_MODEL = {"load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"}
_UNSUPPORTED_MODEL |= {"use_bnb_nested_quant", "lora_task_type"}
_PATHS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "eval_dataset_name")


@dataclass
class RunArguments:
    """A run as the user asked for it.

    Attributes:
        method: a key of `METHODS`.
        training: the method's configuration.
        model: TRL's model arguments (student, LoRA).
        data: where the prompts come from.
        launch: how its processes are started.
        given: the values that the file and the flags set, by name.
        notes: what the user should be told before the run.
    """

    method: str
    training: TokenSelectiveConfig
    model: ModelConfig
    data: DataArguments
    launch: LaunchArguments
    given: dict[str, Any]
    notes: list[str]


def parse_run(config: str | None, flags: Sequence[str]) -> RunArguments:
    """Read `config` (a path or a preset's name) and the flags that override it.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    return _build(*read_run(config, flags))


def read_run(config: str | None, flags: Sequence[str]) -> tuple[str, dict[str, Any], dict[str, Any], list[str]]:
    """The same before anything looks at this machine: method, all values, those that were given, and notes."""
    problems: list[str] = []
    from_file = read_yaml(config) if config is not None else {}
    from_flags = read_flags(flags, problems)
    given = {**from_file, **from_flags}
    method = given.pop("method", "tsd-kd")
    if not isinstance(method, str) or method not in METHODS:
        problems.append(
            f"method: must be one of {', '.join(METHODS)}, found {method!r}{nearest(str(method), METHODS)}"
        )
        raise ConfigError(problems)
    notes = _drop_other_methods(given, method, from_file, from_flags)

    classes = (METHODS[method], ModelConfig, DataArguments, LaunchArguments)
    hints: dict[str, Any] = {}
    for cls in reversed(classes):
        hints |= {n: h for n, h in typing.get_type_hints(cls).items() if not n.startswith("_")}
    values = {f.name: default_of(cls, f.name) for cls in classes for f in fields(cls) if f.name in hints}
    for key, raw in list(given.items()):
        if key not in hints or key in _UNSUPPORTED_MODEL:
            problems.append(_unknown_key(key, method, [h for h in hints if h not in _UNSUPPORTED_MODEL]))
            continue
        try:
            given[key] = values[key] = coerce(locate(raw) if key in _PATHS else raw, hints[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
    problems += _missing(given, METHODS[method].refused)
    for cls in classes:
        problems += check_values(cls, values)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return method, values, given, notes


def _build(method: str, values: dict[str, Any], given: dict[str, Any], notes: list[str]) -> RunArguments:
    def build(cls: type, left_out: str = "") -> Any:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in given and f.name != left_out})

    classes = (METHODS[method], ModelConfig, DataArguments, LaunchArguments)
    try:
        training, model, data, launch = (build(cls) for cls in classes)
    except ConfigError:
        raise
    except Exception as error:  # what transformers, TRL and accelerate check themselves
        text = " ".join(str(error).split())
        culprits = [key for key in given if all(_works(partial(build, cls, key)) for cls in classes)]
        mentioned = [f.name for f in fields(METHODS[method]) if f.name in re.findall(r"\w+", text)]
        raise ConfigError([f"{', '.join(culprits or mentioned)}: {text}".removeprefix(": ")]) from error
    if training.top_p < 1.0:
        notes.append(f"note: top_p {training.top_p}: rollouts come from a nucleus, which the loss doesn't model")
    return RunArguments(method, training, model, data, launch, given, notes)


def _works(build: Callable[[], Any]) -> bool:
    try:
        build()
    except Exception:
        return False
    return True


def read_yaml(config: str) -> dict[str, Any]:
    """The flat mapping in a YAML file.

    Raises:
        ConfigError: missing, unreadable, not YAML, not a mapping, or a key twice.
    """
    try:
        path = Path(config) if Path(config).exists() else find_preset(config)
        if path is None:
            raise ConfigError(
                [
                    f"--config: no file and no shipped preset is called {config!r}{nearest(config, preset_names())}; "
                    "see `tsdkd configs`"
                ]
            )
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError([f"--config: {config} can't be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config: {config} can't be read: it isn't UTF-8 text"]) from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"--config: {config} is not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(loaded, dict):
        found = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError([f"--config: {config} must hold a mapping of keys to values, found {found}"])
    return {str(key): value for key, value in loaded.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error: YAML's silent last-one-wins has cost people runs."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            raise yaml.YAMLError(f"key {key_node.value!r} is given twice, line {key_node.start_mark.line + 1}")
        seen.add(key_node.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_flags(flags: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key` (true), `--key a b` (a list); dashes in keys count as underscores."""
    given: dict[str, Any] = {}
    current: str | None = None
    for token in flags:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            current = name.replace("-", "_")
            given[current] = [value] if equals else []
        elif current is None:
            hint = f"; did you mean --config {token}?" if token.endswith((".yaml", ".yml")) else ""
            problems.append(f"{token!r}: expected a --key before it{hint}")
        else:
            given[current].append(token)
    return {k: True if not v else v[0] if len(v) == 1 else v for k, v in given.items()}


def _drop_other_methods(
    given: dict[str, Any], method: str, from_file: dict[str, Any], from_flags: dict[str, Any]
) -> list[str]:
    """With `--method` on the command line, the file's options of the method it was written for are left out."""
    if "method" not in from_flags or from_file.get("method", "tsd-kd") == method:
        return []
    own = {f.name for f in fields(METHODS[method])} - METHODS[method].refused.keys()
    others = {f.name for cls in METHODS.values() for f in fields(cls)} - own
    dropped = sorted(k for k in given if k in others and k not in from_flags)
    for key in dropped:
        del given[key]
    written_for = from_file.get("method", "tsd-kd")
    return (
        [f"note: {', '.join(dropped)} of the file, written for {written_for}, mean nothing to {method}: left out"]
        if dropped
        else []
    )


def _unknown_key(key: str, method: str, known: Sequence[str]) -> str:
    owners = [name for name, cls in METHODS.items() if any(f.name == key for f in fields(cls))]
    if owners:
        return f"{key}: belongs to method {', '.join(owners)}, this run's method is {method}"
    return f"{key}: unknown key{nearest(key, known)}"


def _missing(given: dict[str, Any], refused: Mapping[str, str]) -> list[str]:
    needed = {
        "model_name_or_path": "the student",
        "teacher_model_name_or_path": "the teacher",
        "dataset_name": "the prompts",
        "output_dir": "where the student is saved",
    }
    return [
        f"{key}: missing, it names {what}"
        for key, what in needed.items()
        if given.get(key) in (None, "") and key not in refused
    ]


def locate(value: Any) -> Any:
    """`tsdkd://demo/student` is a file that ships with the package."""
    if isinstance(value, str) and value.startswith("tsdkd://"):
        return str(resources.files("tsdkd").joinpath(value.removeprefix("tsdkd://")))
    return value
