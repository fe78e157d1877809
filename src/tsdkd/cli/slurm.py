"""`tsdkd slurm`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.launch import launch_config_names
from ..errors import OutputDirError, escape_line
from .arguments import build_run_parser, int_at_least

_EPILOG = """Other flags are passed to `tsdkd train`. Before its time limit, and when it is preempted, the job saves a
checkpoint and queues itself again; it then resumes from the checkpoint.
example:
  tsdkd slurm --config qwen25_14b_to_1p5b.yaml --nodes 2 --time 04:00:00 --output_dir student --output_file job.sbatch
  sbatch job.sbatch"""


def main(argv: Sequence[str]) -> int:
    """Write the script to a file, or print it."""
    about = "Write an sbatch script that trains with a configuration."
    usage = "--time HH:MM:SS [--nodes N] [--teacher_nodes N] [--gpus_per_node N] [--output_file FILE] "
    renamed = {"script": "output_file"}
    parser = build_run_parser("slurm", about, _EPILOG, usage, renamed)
    parser.add_argument("--output_file", metavar="FILE", type=Path, help="file to write; by default it is printed")
    parser.add_argument(
        "--nodes", type=int_at_least(1), metavar="N", default=1, help="number of nodes; default: %(default)s"
    )
    parser.add_argument(
        "--teacher_nodes",
        type=int_at_least(0),
        metavar="N",
        default=0,
        help="number of further nodes, which serve the teacher (`tsdkd serve teacher`); default: 0",
    )
    parser.add_argument(
        "--teacher_partition",
        metavar="NAME",
        default="",
        help="partition of these nodes; default: that of --partition",
    )
    parser.add_argument(
        "--teacher_gpus_per_node",
        type=int_at_least(0),
        metavar="N",
        help="GPUs on each of these nodes; default: that of --gpus_per_node",
    )
    add_job_flags(parser)
    parser.add_argument("--time", required=True, metavar="HH:MM:SS", help="time limit of one job")
    parser.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help=f"a file, or one of {', '.join(launch_config_names())}; default: the configuration's, else zero2",
    )
    args, flags = parser.parse_known_args(argv)
    parser.refuse_misspelled(flags)

    from ..launch.slurm import build_sbatch_script

    settings = vars(args)
    output_file = settings.pop("output_file")
    text = build_sbatch_script(
        settings.pop("config"), flags, settings.pop("accelerate_config"), ["slurm", *argv], **settings
    )
    write_script(text, output_file)
    return 0


def add_job_flags(parser: argparse._ActionsContainer) -> None:
    """The settings of one job that `tsdkd slurm` and `tsdkd compare --slurm` share."""
    parser.add_argument(
        "--gpus_per_node",
        type=int_at_least(0),
        metavar="N",
        default=8,
        help="default: %(default)s; 0: one process per node, on CPUs",
    )
    parser.add_argument(
        "--cpus_per_task",
        type=int_at_least(0),
        metavar="N",
        default=0,
        help="CPU cores per node; default: 0, the cluster's default",
    )
    parser.add_argument(
        "--signal_seconds",
        type=int_at_least(1),
        metavar="N",
        default=300,
        help="seconds before the time limit at which the job saves and stops; default: %(default)s",
    )
    parser.add_argument("--partition", metavar="NAME", default="", help="default: the cluster's default")
    parser.add_argument("--account", metavar="NAME", default="", help="default: the cluster's default")


def write_script(text: str, output_file: Path | None, submit_with: str = "sbatch") -> None:
    """Write a script to a new file, or print it.

    Args:
        text: the script.
        output_file: the file; None to print.
        submit_with: the command that submits the file.

    Raises:
        OutputDirError: the file exists, or can't be written.
    """
    from ..files import wrap_os_errors

    if output_file is None:
        sys.stdout.write(text)
        return
    with wrap_os_errors(output_file, "--output_file", "written"):
        if output_file.exists():
            raise OutputDirError(f"--output_file: {output_file} exists; choose another name")
        output_file.write_text(text, encoding="utf-8")
    print(escape_line(f"wrote {output_file}; submit it with: {submit_with} {output_file}"))
