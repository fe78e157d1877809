"""The signals that make a run save a checkpoint and stop.

A launcher passes them on as SIGTERM: a terminal already sends Ctrl-C to all processes, and a second Ctrl-C stops at
once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Install `handler` for the stop signals within the block.

    Signals that are already ignored (by nohup, or in a script's background job) stay ignored. Has no effect outside
    the main thread, where handlers can't be installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: the previous handler was not set by Python
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def leave_stop_signals_to_parent() -> None:
    """Let a forked process, such as a data loader's worker, ignore stop signals except SIGTERM from its parent.

    The run needs its workers to finish the step, even if a signal goes to all of its processes.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def announce_stop() -> None:
    """Announce the stop from a Ctrl-C handler. Doesn't use `print`, which the signal may have interrupted."""
    with suppress(OSError):
        os.write(2, b"\ntsdkd: saving a checkpoint after this step; Ctrl-C again stops at once\n")
