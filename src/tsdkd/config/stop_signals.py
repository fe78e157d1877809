"""The signals that stop a run, which saves first.

They are passed on as SIGTERM: a terminal sends Ctrl-C to all of its processes anyway, and a second one means at once.
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
    """Within it, `handler` gets the signals, except those that are ignored already: by nohup, or in the background of
    a script. Without effect in a thread, which can't have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not set by Python


def leave_stop_signals_to_parent() -> None:
    """For a process that a run has forked, such as a data loader's worker: a signal to all of the run's processes
    doesn't end it, since the run needs it to end its step; SIGTERM from the run itself does."""
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
    """For a handler of Ctrl-C. Not by `print`, which it may have interrupted."""
    with suppress(OSError):
        os.write(2, b"\ntsdkd: saving a checkpoint after this step; Ctrl-C again stops at once\n")
