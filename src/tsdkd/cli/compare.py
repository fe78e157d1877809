"""`tsdkd compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, escape_controls, escape_line, install_hint
from .arguments import ArgumentParser, int_at_least
from .slurm import add_job_flags, write_script

_EPILOG = """Run the same command again after an interruption: finished runs are kept, and an unfinished run resumes.
examples:
  tsdkd compare --config demo_table3.yaml --jobs 2
  tsdkd compare --config demo_table3.yaml --report          write the table of the finished runs
  tsdkd compare --config qwen25_table1.yaml --slurm --time 24:00:00 --gpus_per_node 8 --output_file job.sbatch"""


def main(argv: Sequence[str]) -> int:
    """Run a comparison or one of its tasks, or write its table or its SLURM script."""
    parser = ArgumentParser(
        prog="tsdkd compare",
        description="Train several methods with several seeds, and compare them: results.jsonl, tables and a plot. "
        "With a `grid`, the values of each run are first chosen on validation problems.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a comparison file, or the name of a shipped one")
    parser.add_argument("--list", action="store_true", help="list the shipped comparisons and exit")
    parser.add_argument(
        "--jobs", type=int_at_least(1), metavar="N", default=1, help="runs at the same time; default: %(default)s"
    )
    parser.add_argument(
        "--task", type=int_at_least(0), metavar="N", help="do only task N, as one job of a SLURM array does"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; write the table of the finished runs")
    group = parser.add_argument_group("SLURM")
    group.add_argument("--slurm", action="store_true", help="write an sbatch script: an array with one job per task")
    group.add_argument(
        "--output_file", metavar="FILE", type=Path, help="with --slurm: file to write; by default it is printed"
    )
    group.add_argument(
        "--time", metavar="HH:MM:SS", default="04:00:00", help="time limit of one job; default: %(default)s"
    )
    add_job_flags(group)
    args = parser.parse_args(argv)

    from ..compare.config import describe_comparisons, read_comparison  # torch from here on

    if args.list:
        print(describe_comparisons())
        return 0
    if args.output_file is not None and not args.slurm:
        raise ConfigError(["--output_file: only with --slurm; the results go to the comparison's output_dir"])
    if args.config is None:
        raise ConfigError(["--config: missing; name a comparison (`tsdkd compare --list` lists the shipped ones)"])
    if args.task is not None and args.report:
        raise ConfigError(["--report: not with --task; the table is of all finished tasks"])
    comparison = read_comparison(args.config)

    from ..compare import scheduler, task

    if args.slurm:
        names = ("time", "gpus_per_node", "cpus_per_task", "signal_seconds", "partition", "account")
        settings = {name: getattr(args, name) for name in names}
        script = scheduler.build_array_script(comparison, args.config, **settings)
        write_script(script, args.output_file, "bash" if comparison.grid else "sbatch")
        return 0
    if args.task is not None:
        if args.task >= len(comparison.tasks):
            raise ConfigError([f"--task: must be from 0 to {len(comparison.tasks) - 1}, found {args.task}"])
        task.run_task(comparison, comparison.tasks[args.task])
        return 0
    results = _import_results()
    if not args.report:
        scheduler.run_tasks(comparison, args.config, args.jobs)
    path = results.write_results(comparison)
    if path is None:
        print("tsdkd compare: no task is finished yet")
        return 0
    print(escape_controls(path.read_text(encoding="utf-8")))
    print(escape_line(f"wrote {path}, and results.jsonl, results.csv and results.png in the same folder"))
    return 0


def _import_results():  # type: ignore[no-untyped-def]
    """Import before the first run: the table needs packages of an extra."""
    try:
        from ..compare import results
    except ImportError as error:
        raise ConfigError([f"compare needs {error.name}; {install_hint('report')}"]) from error
    return results
