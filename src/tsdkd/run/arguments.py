"""One flat YAML and command-line flags -> typed, checked arguments; all problems of both reported together."""

import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig

from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.coercion import coerce, did_you_mean
from ..config.launch import LaunchArguments
from ..config.validation import get_default, get_rules, validate_options
from ..errors import ConfigError
from ..methods import METHODS
from .config_file import read_flags, read_yaml, resolve_path

_UNSUPPORTED_MODEL_KEYS = {"load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"}
_UNSUPPORTED_MODEL_KEYS |= {"use_bnb_nested_quant", "lora_task_type"}
_PATH_KEYS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "eval_dataset_name")


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
        flags: the names that the flags set.
        notes: what the user should be told before the run.
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
    """The run that a YAML file and flags ask for; one that isn't trained may want a GPU that isn't here. Raises
    `ConfigError`."""
    if config is None and not flags:
        raise ConfigError(["--config: missing; name a YAML file or a shipped preset (`tsdkd configs` lists them)"])
    arguments = parse_args_and_config(config, flags, do_train)
    for note in arguments.notes:
        print_rank_0(note)
    return arguments


def parse_args_and_config(config: str | None, flag_names: Sequence[str], do_train: bool = True) -> RunArguments:
    """Read `config` (a path or a preset's name) and the flags that override it.

    Args:
        config, flags: the run.
        trains: whether it is to be trained here; otherwise it may want a GPU where there is none.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    method, values, explicit_values, notes = resolve_run_values(config, flag_names)
    bf16 = [name for name in ("bf16", "bf16_full_eval") if values[name]]
    if not bf16 or values["use_cpu"] or is_torch_bf16_gpu_available():
        return _build_run_arguments(method, values, explicit_values, flag_names, notes)
    if do_train:
        here = "this GPU has none" if torch.accelerator.is_available() else "no GPU is visible"
        on_cpu = "--use_cpu true --bf16 false"
        raise ConfigError([f"{', '.join(bf16)}: needs a GPU with bfloat16, and {here}; on a CPU: {on_cpu}"])
    without = {**values, **dict.fromkeys(bf16, False)}  # transformers would refuse it
    arguments = _build_run_arguments(method, without, explicit_values, flag_names, notes)
    for name in bf16:
        setattr(arguments.training_args, name, True)
    return arguments


def resolve_run_values(
    config: str | None, flag_names: Sequence[str]
) -> tuple[str, dict[str, Any], dict[str, Any], list[str]]:
    """The same before anything looks at this machine: method, all values, those that were given, and notes."""
    problems: list[str] = []
    from_file = read_yaml(config) if config is not None else {}
    from_flags = read_flags(flag_names, problems)
    explicit_values = {**from_file, **from_flags}
    method = explicit_values.pop("method", "tsd-kd")
    if not isinstance(method, str) or method not in METHODS:
        problems.append(
            f"method: must be one of {', '.join(METHODS)}, found {method!r}{did_you_mean(str(method), METHODS)}"
        )
        raise ConfigError(problems)
    notes = _drop_options_of_other_methods(explicit_values, method, from_file, from_flags)

    classes = (METHODS[method].config_class, ModelConfig, DataArguments, LaunchArguments)
    hints: dict[str, Any] = {}
    for cls in reversed(classes):
        hints |= {n: h for n, h in typing.get_type_hints(cls).items() if not n.startswith("_")}
    values = {f.name: get_default(cls, f.name) for cls in classes for f in fields(cls) if f.name in hints}
    for key, raw in list(explicit_values.items()):
        if key not in hints or key in _UNSUPPORTED_MODEL_KEYS:
            problems.append(_explain_unknown_key(key, method, [h for h in hints if h not in _UNSUPPORTED_MODEL_KEYS]))
            continue
        try:
            explicit_values[key] = values[key] = coerce(resolve_path(raw) if key in _PATH_KEYS else raw, hints[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
    notes += _drop_unused_vllm_options(explicit_values, values, METHODS[method].config_class, from_flags)
    notes += _note_dataset_completions(values, METHODS[method].config_class, from_file, from_flags)
    problems += _missing_keys(explicit_values, METHODS[method].config_class.unsupported_options)
    for cls in classes:
        problems += validate_options(cls, values)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return method, values, explicit_values, notes


def _build_run_arguments(
    method: str, values: dict[str, Any], explicit_values: dict[str, Any], flag_names: Sequence[str], notes: list[str]
) -> RunArguments:
    def build(cls: type, excluded: str = "") -> Any:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in explicit_values and f.name != excluded})

    classes = (METHODS[method].config_class, ModelConfig, DataArguments, LaunchArguments)
    try:
        training_args, model_args, data_args, launch_args = (build(cls) for cls in classes)
    except ConfigError:
        raise
    except Exception as error:  # what transformers, TRL and accelerate check themselves
        text = " ".join(str(error).split())
        culprits = [key for key in explicit_values if all(_can_build(partial(build, cls, key)) for cls in classes)]
        mentioned = [f.name for f in fields(METHODS[method].config_class) if f.name in re.findall(r"\w+", text)]
        raise ConfigError([f"{', '.join(culprits or mentioned)}: {text}".removeprefix(": ")]) from error
    if training_args.top_p < 1.0:
        notes.append(f"note: top_p {training_args.top_p}: rollouts come from a nucleus, which the loss doesn't model")
    return RunArguments(
        method,
        training_args,
        model_args,
        data_args,
        launch_args,
        explicit_values,
        set(read_flags(flag_names, [])),
        notes,
    )


def _can_build(build: Callable[[], Any]) -> bool:
    try:
        build()
    except Exception:
        return False
    return True


def _drop_options_of_other_methods(
    explicit_values: dict[str, Any], method: str, from_file: dict[str, Any], from_flags: dict[str, Any]
) -> list[str]:
    """With `--method` on the command line, the file's options of the method it was written for are left out."""
    if "method" not in from_flags or from_file.get("method", "tsd-kd") == method:
        return []
    own = {f.name for f in fields(METHODS[method].config_class)} - METHODS[
        method
    ].config_class.unsupported_options.keys()
    others = {f.name for trainer in METHODS.values() for f in fields(trainer.config_class)} - own
    dropped = sorted(k for k in explicit_values if k in others and k not in from_flags)
    for key in dropped:
        del explicit_values[key]
    written_for = from_file.get("method", "tsd-kd")
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
    """Where a flag takes vLLM away, or its engine, the file's options of it are left out: they don't change what is
    learnt."""
    if not from_flags.keys() & {"use_vllm", "vllm_mode", "lmbda", "method"}:
        return []
    of_file = [key for key in explicit_values if key.removeprefix("use_").startswith("vllm") and key not in from_flags]
    no_effect_rules, dropped = get_rules(cls)[1], []
    for key in sorted(of_file):  # use_vllm comes first, on which the others depend
        if not values["use_vllm"] or (key in no_effect_rules and no_effect_rules[key][0](values)):
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
    """Where a flag changes the data set, its completions may be anybody's; a local file's are the user's own."""
    name = from_flags.get("dataset_name")
    trains_on_them = cls.always_needs_completions or values["lmbda"] < 1
    if not trains_on_them or name in (None, from_file.get("dataset_name")) or str(name).endswith(".jsonl"):
        return []
    column = f" (column {values['completion_column']})" if values["completion_column"] else ""
    return [f"note: the completions of {name}{column} are trained on as they are; for the teacher's: tsdkd generate"]


def _explain_unknown_key(key: str, method: str, known: Sequence[str]) -> str:
    owners = [name for name, t in METHODS.items() if any(f.name == key for f in fields(t.config_class))]
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


def print_rank_0(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
