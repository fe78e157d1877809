"""Shows the library's log messages on the command line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARY = logging.getLogger("tsdkd")


class _StreamsHandler(logging.Handler):
    """The message alone: progress of the first process to stdout, warnings of any to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        is_warning = record.levelno >= logging.WARNING
        if is_warning or os.environ.get("RANK", "0") == "0":
            print(self.format(record), file=sys.stderr if is_warning else sys.stdout, flush=True)


@contextmanager
def log_to_streams() -> Iterator[None]:
    """While a command runs."""
    handler, before = _StreamsHandler(), (_LIBRARY.level, _LIBRARY.propagate)
    _LIBRARY.addHandler(handler)
    _LIBRARY.setLevel(logging.INFO)
    _LIBRARY.propagate = False  # the root logger's handlers, which libraries install, would say it again
    try:
        yield
    finally:
        _LIBRARY.removeHandler(handler)
        _LIBRARY.setLevel(before[0])
        _LIBRARY.propagate = before[1]


def set_log_level(name: str) -> None:
    """A run's `log_level`, as transformers takes it: "passive" changes nothing."""
    if name != "passive":
        _LIBRARY.setLevel(name.upper())
