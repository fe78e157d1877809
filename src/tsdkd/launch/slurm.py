"""An sbatch script for a configuration: launch on every node, signal before the time limit, requeue, resume."""

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..checkpointing.preemption import PREEMPTED_FILE
from ..config.coercion import is_plain_text, shorten
from ..config.launch import find_launch_config
from ..errors import ConfigError
from ..run.arguments import resolve_run_values
from ..run.config_file import read_flags

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def build_sbatch_script(
    config: str | None,
    flags: Sequence[str],
    accelerate_config: str | None,
    command_line: Sequence[str],
    **settings: Any,
) -> str:
    """The script.

    Args:
        config: a YAML file or a shipped name, as `tsdkd train` takes it.
        flags: of `tsdkd train`.
        accelerate_config: a shipped name or a file; none: the configuration's, or else zero2. The script says how
            many nodes and processes there are.
        command_line: the arguments of the command that asks for it, for the script's head.
        settings: what `slurm.sh.j2` names: nodes, gpus_per_node (0: a CPU job of a process a node), time, ….

    Raises:
        ConfigError: a configuration or settings that can't be run.
    """
    if accelerate_config is not None:
        find_launch_config(accelerate_config)
    values = resolve_run_values(config, flags).values  # a bad value fails here, not after hours in a queue
    if "num_processes" in read_flags(flags, []):
        raise ConfigError(["--num_processes: the script starts a process on each GPU; set --gpus_per_node"])
    folder = Path(str(values["output_dir"]))
    launch_config = accelerate_config or values["accelerate_config"] or "zero2"
    own = {
        "marker": shlex.quote(path_operand(str(folder / PREEMPTED_FILE))),
        "command": shlex.join(["train", *(["--config", path_operand(config)] if config else []), *flags]),
        "accelerate_config": shlex.quote(path_operand(launch_config)),
        "written_by": shlex.join(command_line),
    }
    return render_job_script(
        "launch/slurm.sh.j2", folder, settings, [*command_line, str(folder), launch_config], **own
    )


def path_operand(name: str) -> str:
    """A file's name that no command takes for an option."""
    return f"./{name}" if name.startswith("-") else name


def render_job_script(
    template: str, folder: Path, settings: Mapping[str, Any], words: Sequence[str], **own: Any
) -> str:
    """A script of this package, for jobs that are called after the folder that they write into.

    Args:
        template: its file.
        folder: where the jobs write.
        settings: time, signal_seconds, partition, account, and what else the template names.
        words: of the command and of its configuration, which all end in the script.
        own: the same, checked and quoted by the caller.

    Raises:
        ConfigError: settings or words that can't be run.
    """
    problems = _validate_settings(settings, words)
    if problems:
        raise ConfigError(problems)
    source = resources.files("tsdkd").joinpath(template).read_text(encoding="utf-8")
    name = re.sub(r"[^\w.-]", "-", folder.resolve().name) or "tsdkd"
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render(name=name, **own, **settings)


def _validate_settings(settings: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Problems with values that SLURM or the shell would misread."""
    problems = [
        f"{shorten(word)}: has a line break, or isn't text, which a script can't hold"
        for word in words
        if "\n" in word or "\r" in word or not is_plain_text(word)
    ]
    for name in ("partition", "account"):
        if not re.fullmatch(r"[\w.,@-]*", settings[name], re.ASCII):
            problems.append(f"{name}: must be letters, digits, and . , @ - _, found {settings[name]!r}")
    seconds = _parse_time_limit(settings["time"])
    if seconds is None:
        problems.append(f"time: must be HH:MM:SS, or another of SLURM's forms, found {settings['time']!r}")
    elif seconds <= settings["signal_seconds"] + 60:
        problems.append(
            f"signal_seconds: a job of {settings['time']} would be told to stop {settings['signal_seconds']} seconds "
            "before its end, and SLURM may do so a minute early: that leaves no time"
        )
    return problems


def _parse_time_limit(time: str) -> int | None:
    """Seconds of a SLURM time limit (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS), or None."""
    found = _TIME_LIMIT.fullmatch(time)
    if found is None:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
