"""`tsdkd report`."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, escape_line, install_hint
from .arguments import ArgumentParser


def main(argv: Sequence[str]) -> int:
    """Write the report."""
    parser = ArgumentParser(
        prog="tsdkd report",
        description="Write one HTML file about one or more runs: a summary, training curves, the papers' figures, "
        "evaluations, and completions token by token (for runs with --record_steps N).",
        allow_abbrev=False,
        renamed={"output": "output_file"},
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="output_dir of a run")
    parser.add_argument(
        "--output_file",
        type=Path,
        metavar="FILE",
        help="HTML file to write; default: report.html in the first run's folder",
    )
    args = parser.parse_args(argv)
    try:
        from ..report.page import write_report
    except ImportError as error:
        raise ConfigError([f"report needs {error.name}; {install_hint('report')}"]) from error

    path = write_report(args.runs, args.output_file or args.runs[0] / "report.html")
    print(escape_line(f"written to {path}"))
    return 0
