"""All errors that a user can cause, with the exit codes of the command line.

Each class also inherits from the standard exception that a caller of the Python API would expect. Messages may quote
untrusted text; `escape_line` and `escape_controls` make it safe for a terminal.
"""

import re
from collections.abc import Iterable

# C0 except tab and newline, DEL, C1, text direction marks, line and paragraph separators, lone surrogates
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TSDKDError(Exception):
    """Base class of all errors that tsdkd raises for invalid input."""

    exit_code = 2

    @property
    def lines(self) -> list[str]:
        """Return the message as lines. A line break within an item comes from quoted text."""
        return [str(self)]


class ConfigError(TSDKDError, ValueError):
    """The configuration is invalid. `problems` lists all problems found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    @property
    def lines(self) -> list[str]:
        """See `TSDKDError`."""
        return self.problems


class DataError(TSDKDError, ValueError):
    """A data set is missing, empty, or contains an invalid row."""


class ModelError(TSDKDError, OSError):
    """A model or tokenizer can't be loaded."""


class TokenizerMismatchError(TSDKDError, ValueError):
    """Student and teacher do not have the same token -> id map."""


class EngineError(TSDKDError, RuntimeError):
    """A rollout engine can't start, does not respond, or does not have the student's weights."""


class NonFiniteError(TSDKDError, FloatingPointError):
    """A loss or gradient is not finite, because the run diverged or because of its input."""

    exit_code = 3


class PreemptedError(TSDKDError, InterruptedError):
    """A signal stopped the run; it can be resumed."""

    exit_code = 75  # sysexits.h: try again later


class CheckpointError(TSDKDError, OSError):
    """A checkpoint can't be written, or contains unsafe data. Can be raised on a single process, which reports it."""


class ResumeError(TSDKDError, ValueError):
    """There is no checkpoint that this run can be resumed from."""


class OutputDirError(TSDKDError, FileExistsError):
    """The output directory contains files that the run would overwrite."""


def list_names(names: Iterable[str]) -> str:
    """Join the first 20 names for a message; untrusted data may have thousands of columns."""
    names = list(names)
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(name[:60] for name in names[:20]) + more if names else "none"


def install_hint(extra: str) -> str:
    """How to install an extra: there is no package on an index."""
    return f"install the extra '{extra}': pip install -e '.[{extra}]' in the clone of tsdkd"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain_damage(error: BaseException) -> str:
    """Like `first_line`, for an error from reading a damaged file: a `KeyError` becomes "… is missing"."""
    return f"{error} is missing" if isinstance(error, KeyError) else first_line(error)


def escape_controls(text: str) -> str:
    """Escape control characters and unencodable characters, e.g. as `\\x1b`; keep tab and newline."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_line(text: str) -> str:
    """Like `escape_controls`, but also escape tab and newline, so that the result is one line."""
    return escape_controls(text).replace("\t", "\\t").replace("\n", "\\n")
