"""Checks that all packages a run needs are installed, before it starts processes or loads models."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError, install_hint
from ..rollout.vllm import require_vllm
from ..run.arguments import resolve_run_values
from .processes import LaunchSpec

_EXTRA_KEYS = ("use_vllm", "teacher_placement", "use_peft")


def missing_extras(
    config: str | None, flags: Sequence[str], raw_values: Mapping[str, Any], launch_spec: LaunchSpec | None
) -> list[str]:
    """Return a line for each missing package, with the extra that installs it.

    Args:
        config, flags: the run.
        raw_values: its unparsed values.
        launch_spec: the processes that the run is about to start.

    Raises:
        ConfigError: a package seems to be missing, but the configuration itself is invalid.
    """
    if not _missing_packages({**dict.fromkeys(_EXTRA_KEYS), **raw_values}, launch_spec):
        return []
    values = resolve_run_values(config, flags).values  # flags may override keys of the file
    return _missing_packages(values, launch_spec)


def _missing_packages(values: Mapping[str, Any], launch_spec: LaunchSpec | None) -> list[str]:
    problems = []
    if _is_true(values["use_vllm"]):
        try:
            require_vllm()
        except ConfigError as error:
            problems += error.problems
    placement = values["teacher_placement"]
    deepspeed_reasons = (
        [f"accelerate_config: {launch_spec.config}"] if launch_spec and launch_spec.uses_deepspeed else []
    )
    deepspeed_reasons += [f"teacher_placement: {placement}"] if placement in ("zero3", "cpu_offload") else []
    if find_spec("deepspeed") is None:
        problems += [f"{what} requires DeepSpeed; {install_hint('deepspeed')}" for what in deepspeed_reasons]
    if _is_true(values["use_peft"]) and find_spec("peft") is None:
        problems.append(f"use_peft: PEFT is not installed; {install_hint('peft')}")
    return problems


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"
