"""Every error that a user can cause, with the exit code that the command line gives it.

Each class is also the standard exception that a caller of the Python API would expect to catch. What an error quotes
may be a stranger's: `escape_line` and `escape_controls` make it fit for a terminal.
"""

import re
from collections.abc import Iterable

# C0 but tab and newline, DEL, C1, directions of text, separators of lines and paragraphs, halves of surrogate pairs
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TSDKDError(Exception):
    """Base of all errors that tsdkd raises on bad input."""

    exit_code = 2

    @property
    def lines(self) -> list[str]:
        """The message, one item a line: a line end within an item was quoted from somewhere."""
        return [str(self)]


class ConfigError(TSDKDError, ValueError):
    """A configuration that can't be run. `problems` lists all that was found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    @property
    def lines(self) -> list[str]:
        """See the base."""
        return self.problems


class DataError(TSDKDError, ValueError):
    """A data set that is missing, empty, or has a row that can't be used."""


class ModelError(TSDKDError, OSError):
    """A model or tokenizer that can't be loaded."""


class TokenizerMismatchError(TSDKDError, ValueError):
    """Student and teacher don't share one token -> id map."""


class EngineError(TSDKDError, RuntimeError):
    """A rollout engine that can't start, doesn't answer, or holds other weights than the student's."""


class NonFiniteError(TSDKDError, FloatingPointError):
    """A loss or gradient that is not finite: the run diverged, or its input broke it."""

    exit_code = 3


class PreemptedError(TSDKDError, InterruptedError):
    """A run that a signal stopped; it can be continued."""

    exit_code = 75  # sysexits.h: try again later


class CheckpointError(TSDKDError, OSError):
    """A checkpoint that can't be written, or holds what may not be read. Any one process can meet it, and says it."""


class ResumeError(TSDKDError, ValueError):
    """No checkpoint that this run could be continued from."""


class OutputDirError(TSDKDError, FileExistsError):
    """The output directory holds files that the run would overwrite."""


def list_names(names: Iterable[str]) -> str:
    """The first 20 names, for a message: a stranger's data may have thousands of columns."""
    names = list(names)
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(name[:60] for name in names[:20]) + more if names else "none"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain_damage(error: BaseException) -> str:
    """`first_line` of what reading a damaged file raised: a `KeyError` says that its key is missing."""
    return f"{error} is missing" if isinstance(error, KeyError) else first_line(error)


def escape_controls(text: str) -> str:
    """Show what would steer a terminal, or couldn't be encoded, as an escape such as `\\x1b`; tab and newline stay."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_line(text: str) -> str:
    """`escape_controls`, and tab and newline too: a name that has them makes no line of its own."""
    return escape_controls(text).replace("\t", "\\t").replace("\n", "\\n")
