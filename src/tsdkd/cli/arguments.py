"""What several commands take: a run's configuration, and numbers with what they must fulfil in the error messages."""

import argparse
import math
from collections.abc import Callable


def build_run_parser(command: str, description: str, epilog: str, usage: str) -> argparse.ArgumentParser:
    """The parser of a command whose other flags are keys of `tsdkd train`."""
    parser = argparse.ArgumentParser(
        prog=f"tsdkd {command}",
        description=description,
        epilog=epilog,
        usage=f"tsdkd {command} --config FILE {usage}[--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a shipped one (`tsdkd configs`)")
    return parser


def int_at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, found {text!r}")
        return value

    return parse


def positive_float(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, found {text!r}")
    return value
