"""`tsdkd compare`."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import ConfigError, escape_controls, escape_line
from .arguments import ArgumentParser, int_at_least

_EPILOG = """What is finished isn't done again, and a run that was interrupted continues: the same command goes on.
examples:
  tsdkd compare --config demo_table3.yaml --jobs 2
  tsdkd compare --config demo_table3.yaml --report          the table of what is finished
  tsdkd compare --config qwen25_table1.yaml --slurm --time 24:00:00 --gpus_per_node 8 > job.sbatch"""


def main(argv: Sequence[str]) -> int:
    """Run a comparison, one task of it, or write its table or its SLURM script."""
    parser = ArgumentParser(
        prog="tsdkd compare",
        description="Methods x seeds on one pair and the same prompts: results.jsonl, a Markdown table, a plot.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a comparison, or the name of a shipped one")
    parser.add_argument("--list", action="store_true", help="list the shipped comparisons, and stop")
    parser.add_argument("--jobs", type=int_at_least(1), default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--task", type=int_at_least(0), metavar="N", help="do only this one, as a SLURM array does")
    parser.add_argument("--report", action="store_true", help="only write the table of what is finished")
    group = parser.add_argument_group("a SLURM array")
    group.add_argument("--slurm", action="store_true", help="print an sbatch script with a job for every run and seed")
    group.add_argument("--time", default="04:00:00", help="the time limit of one job; default: %(default)s")
    group.add_argument("--gpus_per_node", type=int_at_least(0), default=8, help="default: %(default)s")
    group.add_argument("--cpus_per_task", type=int_at_least(0), default=0, help="0: the cluster's default")
    group.add_argument("--signal_seconds", type=int_at_least(1), default=300, help="default: %(default)s")
    group.add_argument("--partition", default="")
    group.add_argument("--account", default="")
    args = parser.parse_args(argv)

    from ..compare.config import describe_comparisons, read_comparison  # torch from here on

    if args.list:
        print(describe_comparisons())
        return 0
    if args.config is None:
        raise ConfigError(["--config: missing; name a comparison (`tsdkd compare --list` shows the shipped ones)"])
    comparison = read_comparison(args.config)

    from ..compare import scheduler, task

    if args.slurm:
        names = ("time", "gpus_per_node", "cpus_per_task", "signal_seconds", "partition", "account")
        settings = {name: getattr(args, name) for name in names}
        sys.stdout.write(scheduler.build_array_script(comparison, args.config, **settings))
        return 0
    if args.task is not None:
        if args.task >= len(comparison.tasks):
            raise ConfigError([f"--task: there are {len(comparison.tasks)} tasks, from 0, found {args.task}"])
        task.run_task(comparison, comparison.tasks[args.task])
        return 0
    results = _import_results()
    if not args.report:
        scheduler.run_tasks(comparison, args.config, args.jobs)
    path = results.write_results(comparison)
    if path is None:
        print("tsdkd compare: nothing is finished yet")
        return 0
    print(escape_controls(path.read_text(encoding="utf-8")))
    print(escape_line(f"written to {path}, with results.jsonl and results.png beside it"))
    return 0


def _import_results():  # type: ignore[no-untyped-def]
    """Before the first run: the table's dependencies are an extra."""
    try:
        from ..compare import results
    except ImportError as error:
        raise ConfigError([f"compare needs {error.name}; pip install 'tsdkd[report]'"]) from error
    return results
