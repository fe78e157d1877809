"""`tsdkd slurm`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.launch import launch_config_names
from ..errors import OutputDirError, escape_line
from .arguments import build_run_parser, int_at_least

_EPILOG = """Other flags go to `tsdkd train`. The job saves and is queued again before its time limit, and after a
preemption; it continues by itself.
example:
  tsdkd slurm --config qwen25_14b_to_1p5b.yaml --nodes 2 --time 04:00:00 --output_dir student --script job.sbatch
  sbatch job.sbatch"""


def main(argv: Sequence[str]) -> int:
    """Write the script, or print it."""
    about = "Write an sbatch script for a configuration."
    usage = "[--nodes N] [--gpus_per_node N] --time HH:MM:SS "
    parser = build_run_parser("slurm", about, _EPILOG, usage)
    parser.add_argument("--script", metavar="FILE", help="where the script is written; by default it is printed")
    parser.add_argument("--nodes", type=int_at_least(1), default=1, help="default: %(default)s")
    parser.add_argument(
        "--gpus_per_node", type=int_at_least(0), default=8, help="default: %(default)s; 0: a process a node, on CPUs"
    )
    parser.add_argument(
        "--cpus_per_task", type=int_at_least(0), default=0, help="CPU cores of a node; 0: the cluster's default"
    )
    parser.add_argument("--time", required=True, metavar="HH:MM:SS", help="the time limit of one job")
    parser.add_argument(
        "--signal_seconds", type=int_at_least(1), default=300, help="how long before it to stop; default: %(default)s"
    )
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument(
        "--accelerate_config",
        help=f"a file, or one of {', '.join(launch_config_names())}; default: the configuration's, or else zero2",
    )
    args, flags = parser.parse_known_args(argv)

    from ..files import wrap_os_errors
    from ..launch.slurm import build_sbatch_script

    settings = vars(args)
    script = settings.pop("script")
    text = build_sbatch_script(
        settings.pop("config"), flags, settings.pop("accelerate_config"), ["slurm", *argv], **settings
    )
    if script is None:
        sys.stdout.write(text)
        return 0
    if Path(script).exists():
        raise OutputDirError(f"script: {script} exists; choose another name")
    with wrap_os_errors(Path(script), "script", "written"):
        Path(script).write_text(text, encoding="utf-8")
    print(escape_line(f"wrote {script}; start it with: sbatch {script}"))
    return 0
