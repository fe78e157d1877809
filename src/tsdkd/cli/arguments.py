"""Arguments that several commands share: a run's configuration, and checked numbers."""

import argparse
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from ..errors import PreemptedError, escape_line


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors quote arguments."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        super().error(escape_line(message))


def build_run_parser(command: str, description: str, epilog: str, usage: str) -> ArgumentParser:
    """The parser of a command whose other flags are keys of `tsdkd train`."""
    parser = ArgumentParser(
        prog=f"tsdkd {command}",
        description=description,
        epilog=epilog,
        usage=f"tsdkd {command} --config FILE {usage}[--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a shipped one (`tsdkd configs`)")
    return parser


@contextmanager
def say_how_to_continue(*command: str) -> Iterator[None]:
    """Within it, a run that a signal stops also says by which command it goes on."""
    try:
        yield
    except PreemptedError as error:
        resume = [] if any(word.partition("=")[0] == "--resume" for word in command) else ["--resume", "true"]
        raise PreemptedError(f"{error}; continue with: {shlex.join(['tsdkd', *command, *resume])}") from None


def always_on_policy(config: str | None, flags: Sequence[str]) -> list[str]:
    """`flags` for a command that samples whatever the run would train on: `--lmbda 1`, where the method has it."""
    from ..methods import find_method
    from ..run.config_file import read_flags, read_yaml  # torch from here on

    raw_values = {**(read_yaml(config) if config is not None else {}), **read_flags(flags, [])}
    has_lmbda = find_method(raw_values.get("method", "tsd-kd")).config_class.has_lmbda
    return [*flags, "--lmbda", "1"] if has_lmbda else [*flags]


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
