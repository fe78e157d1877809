"""Reads a YAML file and command-line flags into typed, validated arguments, and reports all problems together."""

import logging
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig

from ..config.aliases import ALIASES, RENAMED, resolve_aliases
from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.coercion import coerce, did_you_mean, explain_unusual
from ..config.launch import LaunchArguments
from ..config.logs import set_log_level
from ..config.options import get_default
from ..config.validation import get_rules, validate_options
from ..data import default_grader, is_reasoning_gym
from ..errors import ConfigError
from ..files import resolve_path
from ..methods import all_methods, find_method
from .config_file import flags_without_value, read_flags, read_yaml

logger = logging.getLogger(__name__)

_MAX_UNKNOWN = 50  # keys that are each explained: what is meant takes time to find
_PATH_KEYS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "eval_dataset_name")


class RunValues(NamedTuple):
    """The values of a run, independent of this machine.

    Attributes:
        method: its name, or `package.module:Trainer`.
        values: of every option, by name.
        explicit_values: those that the file and the flags set.
        notes: what the user should know before the run.
    """

    method: str
    values: dict[str, Any]
    explicit_values: dict[str, Any]
    notes: list[str]


@dataclass
class RunArguments:
    """The arguments of a run.

    Attributes:
        method: its name, or `package.module:Trainer`.
        training_args: the method's configuration.
        model_args: TRL's model arguments (student, LoRA).
        data_args: where the prompts come from.
        launch_args: how its processes are started.
        explicit_values: the values that the file and the flags set, by name.
        flag_names: the names that the flags set.
        notes: what the user should know before the run.
    """

    method: str
    training_args: TokenSelectiveConfig
    model_args: ModelConfig
    data_args: DataArguments
    launch_args: LaunchArguments
    explicit_values: dict[str, Any]
    flag_names: set[str]
    notes: list[str]


def parse_arguments(config: str | None, flags: Sequence[str], do_train: bool = True) -> RunArguments:
    """`parse_args_and_config`, with its notes logged. Raises `ConfigError`."""
    if config is None and not flags:
        raise ConfigError(["--config: missing; name a YAML file or a shipped preset (`tsdkd configs` lists them)"])
    arguments = parse_args_and_config(config, flags, do_train)
    set_log_level(arguments.training_args.log_level)
    for note in arguments.notes:
        logger.info(note)
    return arguments


def parse_args_and_config(config: str | None, flags: Sequence[str], do_train: bool = True) -> RunArguments:
    """Read `config` (a path or a preset's name) and the flags that override it.

    Args:
        config, flags: the run.
        do_train: whether it is to be trained here; otherwise it may need a GPU where there is none.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    run = resolve_run_values(config, flags)
    flag_names = set(resolve_aliases(read_flags(flags, []), []))
    bf16 = [name for name in ("bf16", "bf16_full_eval") if run.values[name]]
    is_default = run.values["bf16"] is None and not run.values["fp16"]  # TRL then turns it on
    if not (bf16 or is_default) or run.values["use_cpu"] or is_torch_bf16_gpu_available():
        return _build_run_arguments(run, flag_names)
    if do_train and bf16:
        here = "this GPU has none" if torch.accelerator.is_available() else "no GPU is visible"
        on_cpu = "--use_cpu true --bf16 false"
        raise ConfigError([f"{', '.join(bf16)}: needs a GPU with bfloat16, and {here}; on a CPU: {on_cpu}"])
    off = dict.fromkeys([*bf16, "bf16"], False)  # transformers would refuse it
    notes = [*run.notes, *(["note: no GPU with bfloat16 is visible: the run is in float32"] if do_train else [])]
    in_float32 = RunValues(run.method, {**run.values, **off}, {**run.explicit_values, **off}, notes)
    arguments = _build_run_arguments(in_float32, flag_names)
    if not do_train:
        arguments.explicit_values = run.explicit_values
        for name in bf16 or ["bf16"]:
            setattr(arguments.training_args, name, True)
    return arguments


def resolve_run_values(config: str | None, flags: Sequence[str] | Mapping[str, Any]) -> RunValues:
    """The values of a run, validated as far as possible without looking at this machine.

    Args:
        config: the run's file.
        flags: what overrides it: as the command line has it, or values by name.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    problems: list[str] = []
    from_file = resolve_aliases(read_yaml(config) if config is not None else {}, problems)
    overriding = flags if isinstance(flags, Mapping) else read_flags(flags, problems)
    bare = set() if isinstance(flags, Mapping) else flags_without_value(flags)
    from_flags = resolve_aliases(overriding, problems)
    explicit_values = {**from_file, **from_flags}
    method = explicit_values.pop("method", "tsd-kd")
    try:
        config_class = find_method(method).config_class
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    notes = _drop_options_of_other_methods(explicit_values, method, from_file, from_flags)
    classes = (config_class, ModelConfig, DataArguments, LaunchArguments)
    values = {f.name: get_default(cls, f.name) for cls in classes for f in fields(cls) if not f.name.startswith("_")}
    problems += _coerce_values(explicit_values, values, method, bare)
    notes += _drop_unused_vllm_options(explicit_values, values, config_class, from_flags)
    notes += _note_dataset_completions(values, config_class, from_file, from_flags)
    problems += _missing_keys(explicit_values, config_class.unsupported_options)
    for cls in classes:
        problems += validate_options(cls, values)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return RunValues(method, values, explicit_values, notes)


def _coerce_values(
    explicit_values: dict[str, Any], values: dict[str, Any], method: str, bare: Collection[str]
) -> list[str]:
    """Store the explicit values in `values`, coerced to the types of their options. Returns the problems."""
    hints: dict[str, Any] = {}
    for cls in (LaunchArguments, DataArguments, ModelConfig, find_method(method).config_class):
        hints |= typing.get_type_hints(cls)
    problems = []
    known = [name for name in values if name not in ALIASES]
    unknown = [key for key in explicit_values if key not in values]
    problems += [_explain_unknown_key(key, method, known) for key in unknown[:_MAX_UNKNOWN]]
    if len(unknown) > _MAX_UNKNOWN:
        problems.append(f"{len(unknown) - _MAX_UNKNOWN} more unknown keys")
    for key in [key for key in explicit_values if key in values]:
        raw = explicit_values[key]
        is_switch = bool in (typing.get_args(hints[key]) or (hints[key],)) or key == "resume_from_checkpoint"
        if key in bare and not is_switch:
            problems.append(f"{key}: the flag needs a value")
            continue
        try:
            value = coerce(resolve_path(raw) if key in _PATH_KEYS else raw, hints[key])
            if isinstance(value, (dict, list, str)) and (problem := explain_unusual(value)):
                raise ValueError(problem)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        explicit_values[key] = values[key] = value
    return problems


def _build_run_arguments(run: RunValues, flag_names: set[str]) -> RunArguments:
    explicit_values, notes = run.explicit_values, list(run.notes)

    def build(cls: type, excluded: str = "") -> Any:
        given = [f.name for f in fields(cls) if f.name in explicit_values and f.name != excluded]
        return cls(**{name: run.values[name] for name in given})

    config_class = find_method(run.method).config_class
    classes = (config_class, ModelConfig, DataArguments, LaunchArguments)
    try:
        training_args, model_args, data_args, launch_args = (build(cls) for cls in classes)
    except ConfigError:
        raise
    except Exception as error:  # what transformers, TRL and accelerate check themselves
        text = " ".join(str(error).split())
        culprits = [key for key in explicit_values if all(_can_build(partial(build, cls, key)) for cls in classes)]
        mentioned = [f.name for f in fields(config_class) if f.name in re.findall(r"\w+", text)]
        raise ConfigError([f"{', '.join(culprits or mentioned)}: {text}".removeprefix(": ")]) from error
    if training_args.grader is None:
        training_args.grader = _default_grader(data_args, notes)
    if training_args.top_p < 1.0:
        notes.append(f"note: top_p {training_args.top_p}: rollouts come from a nucleus, which the loss doesn't model")
    return RunArguments(
        run.method, training_args, model_args, data_args, launch_args, explicit_values, flag_names, notes
    )


def _default_grader(data: DataArguments, notes: list[str]) -> str | None:
    """The grader of the run's data sets. Notes if one of two isn't graded by it."""
    names = [name for name in (data.dataset_name, data.eval_dataset_name) if name is not None]
    grader = default_grader(*names)
    if grader and not all(map(is_reasoning_gym, names)):
        notes.append(f"note: grader {grader}, for the answers of reasoning_gym; others must match exactly")
    return grader


def _can_build(build: Callable[[], Any]) -> bool:
    try:
        build()
    except Exception:
        return False
    return True


def _drop_options_of_other_methods(
    explicit_values: dict[str, Any], method: str, from_file: dict[str, Any], from_flags: dict[str, Any]
) -> list[str]:
    """If `--method` overrides the method of the file, drop the options of the file's method. Returns notes."""
    if "method" not in from_flags or from_file.get("method", "tsd-kd") == method:
        return []
    written_for = from_file.get("method", "tsd-kd")
    with suppress(ConfigError):  # it may name a module that isn't here
        find_method(written_for)
    config_class = find_method(method).config_class
    options = {f.name for f in fields(config_class)} - config_class.unsupported_options.keys()
    others = {f.name for trainer in all_methods().values() for f in fields(trainer.config_class)} - options
    dropped = sorted(k for k in explicit_values if k in others and k not in from_flags)
    for key in dropped:
        del explicit_values[key]
    return (
        [f"note: {', '.join(dropped)} of the file, written for {written_for}, mean nothing to {method}: left out"]
        if dropped
        else []
    )


def _drop_unused_vllm_options(
    explicit_values: dict[str, Any],
    values: dict[str, Any],
    cls: type[TokenSelectiveConfig],
    from_flags: Mapping[str, Any],
) -> list[str]:
    """Drop vLLM options of the file that have no effect because a flag turns vLLM off or changes its mode.

    Returns notes.
    """
    if not from_flags.keys() & {"use_vllm", "vllm_mode", "lmbda", "method"}:
        return []
    of_file = [key for key in explicit_values if key.removeprefix("use_").startswith("vllm") and key not in from_flags]
    rules, dropped = get_rules(cls), []
    for key in sorted(of_file):  # use_vllm comes first, on which the others depend
        no_effect = rules[key].no_effect if key in rules else None
        if not values["use_vllm"] or (no_effect and no_effect[0](values)):
            del explicit_values[key]
            values[key] = get_default(cls, key)
            dropped.append(key)
    return [f"note: {', '.join(dropped)} of the file mean nothing with these flags: left out"] if dropped else []


def _note_dataset_completions(
    values: Mapping[str, Any],
    cls: type[TokenSelectiveConfig],
    from_file: Mapping[str, Any],
    from_flags: Mapping[str, Any],
) -> list[str]:
    """Note that the completions of a data set given by a flag may not be the teacher's. A local JSONL file is
    trusted."""
    name = from_flags.get("dataset_name")
    needs_completions = cls.always_needs_completions or values["lmbda"] < 1
    if not needs_completions or name in (None, from_file.get("dataset_name")) or str(name).endswith(".jsonl"):
        return []
    column = f" (column {values['completion_column']})" if values["completion_column"] else ""
    return [f"note: the completions of {name}{column} are trained on as they are; for the teacher's: tsdkd generate"]


def _explain_unknown_key(key: str, method: str, known: Sequence[str]) -> str:
    if key in RENAMED:
        return f"{key}: is called {RENAMED[key]}"
    owners = [name for name, t in all_methods().items() if any(f.name == key for f in fields(t.config_class))]
    if owners:
        return f"{key}: belongs to method {', '.join(owners)}, this run's method is {method}"
    return f"{key}: unknown key{did_you_mean(key, known)}"


def _missing_keys(explicit_values: dict[str, Any], refused: Mapping[str, str]) -> list[str]:
    needed = {
        "model_name_or_path": "the student",
        "teacher_model_name_or_path": "the teacher",
        "dataset_name": "the prompts",
        "output_dir": "where the student is saved",
    }
    return [
        f"{key}: missing, it names {what}"
        for key, what in needed.items()
        if explicit_values.get(key) in (None, "") and key not in refused
    ]
