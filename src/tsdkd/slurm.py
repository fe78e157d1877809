"""An sbatch script for a configuration: launch on every node, signal before the time limit, requeue, resume."""

import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .errors import ConfigError
from .launch import find_config
from .parsing import read_flags, read_yaml
from .preemption import MARKER


def sbatch_script(
    config: str | None, flags: Sequence[str], accelerate_config: str, written_by: Sequence[str], **settings: Any
) -> str:
    """The script.

    Args:
        config: a YAML file or a shipped name, as `tsdkd train` takes it.
        flags: of `tsdkd train`.
        accelerate_config: a shipped name or a file.
        written_by: the arguments of the command that asks for it, for the script's head.
        settings: what `slurm.sh.j2` names: nodes, gpus_per_node (0: a CPU job of a process a node), time, ….

    Raises:
        ConfigError: no such configuration, or one without `output_dir`.
    """
    find_config(accelerate_config)
    problems: list[str] = []
    values = {**(read_yaml(config) if config else {}), **read_flags(flags, problems)}
    if not values.get("output_dir"):
        problems.append("output_dir: missing; set it in the file or by --output_dir")
    if problems:
        raise ConfigError(problems)
    source = resources.files("tsdkd").joinpath("slurm.sh.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    command = ["train", *(["--config", config] if config else []), *flags]
    return template.render(
        name=re.sub(r"[^\w.-]", "-", Path(str(values["output_dir"])).name),
        marker=shlex.quote(str(Path(str(values["output_dir"]), MARKER))),
        command=shlex.join(command),
        accelerate_config=shlex.quote(accelerate_config),
        written_by=shlex.join(written_by),
        **settings,
    )
