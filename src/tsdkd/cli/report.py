"""`tsdkd report`."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, escape_line
from .arguments import ArgumentParser


def main(argv: Sequence[str]) -> int:
    """Write the page."""
    parser = ArgumentParser(
        prog="tsdkd report",
        description="One HTML file about a run, or several beside each other: how it went, curves, the papers' "
        "figures, evaluations, and completions token by token (of runs with --record_steps N).",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path)
    parser.add_argument("--output", type=Path, help="default: report.html in the first run's directory")
    args = parser.parse_args(argv)
    try:
        from ..report.page import write_report
    except ImportError as error:
        raise ConfigError([f"report needs {error.name}; pip install 'tsdkd[report]'"]) from error

    path = write_report(args.runs, args.output or args.runs[0] / "report.html")
    print(escape_line(f"written to {path}"))
    return 0
