"""Shows the library's log messages on the command line."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from ..config.stop_signals import handle_stop_signals
from ..errors import escape_controls, escape_line

_LIBRARY = logging.getLogger("tsdkd")


class _StreamsHandler(logging.Handler):
    """Prints messages without prefixes: info of the first process to stdout, warnings of all to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        from tqdm import tqdm  # its defaults, which a run may change, are those of the environment at its import

        is_warning = record.levelno >= logging.WARNING
        if is_warning or os.environ.get("RANK", "0") == "0":
            text = escape_controls(self.format(record))
            with tqdm.external_write_mode():  # a run's live line makes room
                print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)


class _EscapedRecord(logging.LogRecord):
    """Escapes control characters, since messages of any library quote files and models."""

    def getMessage(self) -> str:
        """See `logging.LogRecord`."""
        escape = escape_line if self.name.partition(".")[0] == _LIBRARY.name else escape_controls
        return escape(super().getMessage())


@contextmanager
def escape_output() -> Iterator[None]:
    """Within the block, escape log records, warnings, and characters that stdout can't encode."""
    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    stdout = sys.stdout if isinstance(sys.stdout, TextIOWrapper) else None
    encoding_errors = stdout.errors if stdout else None

    def format_escaped(*args: Any, **kwargs: Any) -> str:
        return escape_controls(format_warning(*args, **kwargs))

    logging.setLogRecordFactory(_EscapedRecord)
    warnings.formatwarning = format_escaped
    if stdout:
        stdout.reconfigure(errors="backslashreplace")  # as Python sets stderr
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_warning
        if stdout and not stdout.closed:
            with handle_stop_signals(lambda *_: None):  # it flushes, and nobody may read any more: all is done
                stdout.reconfigure(errors=encoding_errors)


@contextmanager
def log_to_streams() -> Iterator[None]:
    """Within the block, show the library's log messages."""
    handler, before = _StreamsHandler(), (_LIBRARY.level, _LIBRARY.propagate)
    logging.getLogger("DeepSpeed").addFilter(_is_for_users)
    _LIBRARY.addHandler(handler)
    _LIBRARY.setLevel(logging.INFO)
    _LIBRARY.propagate = False  # the root logger's handlers, which libraries install, would say it again
    try:
        with escape_output():
            yield
    finally:
        _LIBRARY.removeHandler(handler)
        _LIBRARY.setLevel(before[0])
        _LIBRARY.propagate = before[1]


def _is_for_users(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's warning that it runs on the CPU, which it logs on every machine without a GPU."""
    return "Setting accelerator to CPU" not in record.getMessage()


def hide_progress_bars() -> None:
    """Hide the progress bars of libraries. Call this before anything imports tqdm."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
