"""Every error that a user can cause, with the exit code that the command line gives it.

Each class is also the standard exception that a caller of the Python API would expect to catch.
"""


class TSDKDError(Exception):
    """Base of all errors that tsdkd raises on bad input."""

    exit_code = 2


class ConfigError(TSDKDError, ValueError):
    """A configuration that can't be run. `problems` lists all that was found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
