"""What several commands share: the parser, a run's configuration, and checked numbers."""

import argparse
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from ..config.coercion import did_you_mean, shorten
from ..errors import ConfigError, PreemptedError, escape_line

LAUNCHER_COMMAND = "TSDKD_COMMAND"
"""Environment variable of the processes that `tsdkd train` starts: its arguments, JSON."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser. Errors escape what they quote, and unknown flags get a suggestion.

    Args:
        renamed: former name of a flag -> its present name, both without dashes.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renamed = dict(renamed or {})

    @property
    def flags(self) -> list[str]:
        """The command's own flags, such as `--output_dir`, and those of its subcommands."""
        subcommands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in subcommands for parser in action.choices.values())]
        return [flag for parser in parsers for flag in parser._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        super().error(escape_line(message))

    # argparse's own signatures have overloads for other namespaces
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """See argparse. Raises `ConfigError` for an argument that the command doesn't have."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            others = {flag: [own for own in self.flags if own != flag] for flag in _flag_names(unknown)}
            problems = [f"{flag}: unknown flag{did_you_mean(flag, known)}" for flag, known in others.items()]
            raise ConfigError(problems or [f"unexpected argument {shorten(unknown[0])}"])
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """See argparse. Raises `ConfigError` for a flag's former name."""
        old = [flag for flag in _flag_names(args or ()) if flag[2:] in self.renamed]
        if old:
            raise ConfigError([f"{flag}: is called --{self.renamed[flag[2:]]}" for flag in old])
        return super().parse_known_args(args, namespace)

    def refuse_misspelled(self, flags: Sequence[str]) -> None:
        """Check the flags that are left for the run's configuration.

        Raises:
            ConfigError: a flag is no key of a run, and is more like one of the command's own flags.
        """
        if not (names := _flag_names(flags)):
            return
        keys = [f"--{key}" for key in _run_keys()]
        hints = {name: did_you_mean(name, [*keys, *self.flags]) for name in names if name not in keys}
        problems = [
            f"{name}: unknown flag{hint}"
            for name, hint in hints.items()
            if any(hint == did_you_mean(name, [own]) for own in self.flags)
        ]
        if problems:
            raise ConfigError(problems)


def _flag_names(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]


def _run_keys() -> set[str]:
    from trl import ModelConfig

    from ..config.aliases import ALIASES, RENAMED
    from ..config.base import DataArguments
    from ..config.launch import LaunchArguments
    from ..methods import METHODS  # torch from here on

    classes = [ModelConfig, DataArguments, LaunchArguments, *(t.config_class for t in METHODS.values())]
    return {f.name for cls in classes for f in fields(cls)} | {"method", *ALIASES, *RENAMED}


def build_run_parser(
    command: str, description: str, epilog: str, usage: str, renamed: Mapping[str, str] | None = None
) -> ArgumentParser:
    """The parser of a command that also takes the keys of `tsdkd train` as flags."""
    parser = ArgumentParser(
        prog=f"tsdkd {command}",
        description=description,
        epilog=epilog,
        usage=f"tsdkd {command} --config FILE {usage}[--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        renamed=renamed,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file, or the name of a shipped configuration (`tsdkd configs`)"
    )
    return parser


@contextmanager
def say_how_to_continue(*command: str, from_checkpoint: bool = False) -> Iterator[None]:
    """Within the block, add to the message of a run that a signal stops the command that continues it.

    Args:
        command: the words after `tsdkd`. A process that `tsdkd train` started says what that was called with.
        from_checkpoint: whether the run's configuration has `resume_from_checkpoint`.
    """
    try:
        yield
    except PreemptedError as error:
        words = json.loads(os.environ.get(LAUNCHER_COMMAND) or json.dumps(command))
        is_launched_by_others = LAUNCHER_COMMAND not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        launcher = " the same launcher and" if is_launched_by_others else ""
        name = "resume_from_checkpoint" if from_checkpoint else "resume"  # whose true means the newest checkpoint
        text = shlex.join(["tsdkd", *_without_resume(words), f"--{name}", "true"])
        raise PreemptedError(f"{error}; continue with{launcher}: {text}") from None


def _without_resume(words: Sequence[str]) -> list[str]:
    """Drop `--resume…` flags and their values."""
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word.partition("=")[0] in ("--resume", "--resume_from_checkpoint")
        if not is_dropped:
            kept.append(word)
    return kept


def always_on_policy(config: str | None, flags: Sequence[str]) -> list[str]:
    """`flags`, with `--lmbda 1` if the method has that option: the command samples, whatever the run trains on."""
    from ..methods import find_method
    from ..run.config_file import read_raw_values  # torch from here on

    has_lmbda = find_method(read_raw_values(config, flags).get("method", "tsd-kd")).config_class.has_lmbda
    return [*flags, "--lmbda", "1"] if has_lmbda else [*flags]


def int_at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

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
    """An argument type: a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, found {text!r}")
    return value
