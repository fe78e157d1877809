"""Makes standard output and error never fail, so that a closed terminal or a full disk doesn't end a run."""

import errno
import io
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..config.stop_signals import handle_stop_signals

_READER_HAS_GONE = {errno.EPIPE, errno.EIO}  # of a pipe, of a terminal


@contextmanager
def never_failing_output() -> Iterator[None]:
    """Within the block, output that can't be written is dropped.

    A full disk changes nothing else. When the reader has gone, as with `| head -1` or a closed terminal, the process
    gets SIGHUP if it handles or ignores that, as a run does, and otherwise ends as other programs do, by SIGPIPE.
    """
    _open_closed_descriptors()
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stack.enter_context(_replaced(name))
        yield


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    """Replace the process's own stream, unless a caller has replaced it already."""
    before = getattr(sys, name)
    if before is None or before is not getattr(sys, f"__{name}__"):
        yield
        return
    raw = _Output(before.fileno(), "w", closefd=False)
    layout = {"encoding": before.encoding, "errors": before.errors, "line_buffering": before.line_buffering}
    stream = io.TextIOWrapper(io.BufferedWriter(raw), write_through=before.write_through, **layout)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        with handle_stop_signals(lambda *_: None):  # all is done: the exit code is known
            stream.flush()
        setattr(sys, name, before)


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        """See `FileIO.write`; never raises."""
        try:
            written = super().write(data)
            while written is None:  # a pipe that doesn't block, and is full
                select.select([], [self], [])
                written = super().write(data)
            return written
        except OSError as error:
            self._on_error(error.errno)
            return memoryview(data).nbytes

    def _on_error(self, code: int | None) -> None:
        if code not in _READER_HAS_GONE or stat.S_ISREG(os.fstat(self.fileno()).st_mode):
            return
        _to_null(self.fileno())  # nor does anything else fail, that writes there
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
        signal.raise_signal(signal.SIGHUP)


def _open_closed_descriptors() -> None:
    """Open closed standard streams (`>&-`); otherwise the next file, maybe a checkpoint, would become one."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
