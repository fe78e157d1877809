"""Writes sbatch scripts that launch a run on every node, signal it before the time limit, requeue and resume it."""

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
from .teacher_server import resolve_served_values

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def build_sbatch_script(
    config: str | None,
    flags: Sequence[str],
    accelerate_config: str | None,
    command_line: Sequence[str],
    **settings: Any,
) -> str:
    """Return an sbatch script for a training run.

    Args:
        config: a YAML file or a shipped name, as for `tsdkd train`.
        flags: flags of `tsdkd train`.
        accelerate_config: a shipped name or a file; default: that of the configuration, or zero2. The script sets the
            numbers of nodes and processes.
        command_line: arguments of the command that created the script, for its header.
        settings: variables of `slurm.sh.j2`: nodes, gpus_per_node (0: a CPU job with one process per node),
            teacher_nodes (in addition, for the teacher), teacher_gpus_per_node, teacher_partition, time, ….

    Raises:
        ConfigError: the configuration or the settings are invalid.
    """
    if accelerate_config is not None:
        find_launch_config(accelerate_config)
    has_server = settings["teacher_nodes"] > 0
    unused = []
    for name in ("partition", "gpus_per_node"):
        if settings[f"teacher_{name}"] in ("", None):
            settings[f"teacher_{name}"] = settings[name]
        elif not has_server:
            unused.append(f"teacher_{name}: is for the nodes of --teacher_nodes, which is 0")
    if unused:
        raise ConfigError(unused)
    # report an invalid value now, not after hours in a queue
    values = resolve_served_values(config, flags) if has_server else resolve_run_values(config, flags).values
    if "num_processes" in read_flags(flags, []):
        raise ConfigError(["--num_processes: the script starts one process per GPU; set --gpus_per_node instead"])
    folder = Path(str(values["output_dir"]))
    launch_config = accelerate_config or values["accelerate_config"] or "zero2"
    run_flags = [*(["--config", path_operand(config)] if config else []), *flags]
    own = {
        "marker": shlex.quote(path_operand(str(folder / PREEMPTED_FILE))),
        "command": shlex.join(["train", *run_flags]),
        "serve_command": shlex.join(["serve", "teacher", *run_flags]),
        "accelerate_config": shlex.quote(path_operand(launch_config)),
        "written_by": shlex.join(command_line),
    }
    return render_job_script(
        "launch/slurm.sh.j2", folder, settings, [*command_line, str(folder), launch_config], **own
    )


def path_operand(name: str) -> str:
    """Return a file name that no command mistakes for an option."""
    return f"./{name}" if name.startswith("-") else name


def render_job_script(
    template: str, folder: Path, settings: Mapping[str, Any], words: Sequence[str], **own: Any
) -> str:
    """Render a job script. The job is named after its output folder.

    Args:
        template: file name of the template in this package.
        folder: output folder of the job.
        settings: time, signal_seconds, partition, account, and other variables of the template.
        words: words of the command and its configuration that appear in the script.
        own: further variables, already checked and quoted by the caller.

    Raises:
        ConfigError: settings or words are invalid.
    """
    problems = _validate_settings(settings, words)
    if problems:
        raise ConfigError(problems)
    source = resources.files("tsdkd").joinpath(template).read_text(encoding="utf-8")
    name = re.sub(r"[^\w.-]", "-", folder.resolve().name) or "tsdkd"
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render(name=name, **own, **settings)


def _validate_settings(settings: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Return problems with values that SLURM or the shell would misinterpret."""
    problems = [
        f"{shorten(word)}: must be text without line breaks, because it is written into a script"
        for word in words
        if "\n" in word or "\r" in word or not is_plain_text(word)
    ]
    for name in ("partition", "teacher_partition", "account"):
        if not re.fullmatch(r"[\w.,@-]*", settings.get(name, ""), re.ASCII):
            problems.append(f"{name}: must contain only letters, digits and . , @ - _, found {settings[name]!r}")
    seconds = _parse_time_limit(settings["time"])
    if seconds is None:
        problems.append(f"time: must be HH:MM:SS or another SLURM time format, found {settings['time']!r}")
    elif seconds <= settings["signal_seconds"] + 60:
        problems.append(
            f"signal_seconds: SLURM signals the job {settings['signal_seconds']} seconds before its end, and up to a "
            f"minute earlier; a time limit of {settings['time']} leaves no time to train"
        )
    return problems


def _parse_time_limit(time: str) -> int | None:
    """Return the seconds of a SLURM time limit (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS), or None."""
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
