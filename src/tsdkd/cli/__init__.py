"""The command line: one small module per command. Only this module catches and prints tsdkd's errors."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ..config.stop_signals import handle_stop_signals
from ..errors import CheckpointError, NonFiniteError, PreemptedError, TSDKDError, escape_line
from ..launch.children import stop_with_launcher
from .logs import log_to_streams

_COMMANDS = {
    "train": "train a student: tsdkd train --config FILE [--key value ...]",
    "compare": "train several methods with several seeds, and compare them in a table, a plot and a test",
    "generate": "write the teacher's or the student's completions to a file, for off-policy runs",
    "eval": "evaluate models on the papers' benchmarks or on your own problems",
    "report": "write one HTML file about one or more runs",
    "analyze": "plot the papers' figures from recorded runs or from any two models",
    "demo": "watch a tiny student learn from a tiny teacher, on a CPU, in minutes",
    "reproduce": "run the papers' small experiments, and compare the numbers with the papers'",
    "plan": "estimate the memory on each GPU, and find the placement that fits",
    "serve": "start a vLLM server for a run's teacher",
    "slurm": "write an sbatch script for a configuration",
    "methods": "list the methods with their options and papers",
    "configs": "list the shipped configurations",
}
_RANK_0_HEAD_START = 10  # seconds that the first process may be behind another one
_EXAMPLES = """examples:
  tsdkd demo
  tsdkd configs
  tsdkd train --config qwen25_14b_to_1p5b.yaml --output_dir student
  tsdkd train --config my.yaml --learning_rate 1e-6 --dry_run
  accelerate launch --num_processes 8 -m tsdkd train --config my.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, an error's (2 for bad input), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="tsdkd",
        description="On-policy, token-selective distillation of LLM reasoning (TSD-KD, EOPD). `tsdkd COMMAND --help` "
        "describes a command.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tsdkd {version('tsdkd')}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # what one library deprecates, another one uses
    stop_with_launcher()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(argv[:1]).command
    try:
        with log_to_streams():
            return int(import_module(f".{command}", __name__).main([_underscore(word) for word in argv[1:]]))
    except TSDKDError as error:
        _print_error(command, error)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\ntsdkd {command}: interrupted", file=sys.stderr)
        return 130


def _underscore(word: str) -> str:
    """`--learning-rate=x` as `--learning_rate=x`."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _print_error(command: str, error: TSDKDError) -> None:
    """Print an error once, although most errors occur in all processes.

    The first process prints it, and then the launcher ends the others. If another process ended sooner, the launcher
    would end the first one before it has printed anything, so the others wait. A process that is still alive after
    the wait was the only one with the error, and prints it.
    """
    if os.environ.get("RANK", "0") != "0" and not isinstance(error, CheckpointError):
        if isinstance(error, PreemptedError):
            return
        time.sleep(_RANK_0_HEAD_START)
        if isinstance(error, NonFiniteError):  # always in all processes
            return
    with handle_stop_signals(lambda *_: None):  # a closed terminal must not change the exit code
        print(*(f"tsdkd {command}: {escape_line(line)}" for line in error.lines), sep="\n", file=sys.stderr)
