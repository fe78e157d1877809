"""Forwards signals from the cluster or the terminal to the processes that train or generate."""

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack

from ..config.stop_signals import handle_stop_signals
from ..launch.children import handle_interrupt


class SignalForwarder:
    """A context manager that forwards stop signals to the running processes as SIGTERM, so that they save and stop.

    A second Ctrl-C kills them. Use it in the main thread.

    Args:
        processes: the processes; the list may grow while the context is active.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self._received: list[int] = []

    @property
    def has_received_signal(self) -> bool:
        """Whether a stop signal has arrived."""
        return bool(self._received)

    def __enter__(self) -> "SignalForwarder":
        self._handlers = ExitStack()
        self._handlers.enter_context(handle_stop_signals(self._forward))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _forward(self, number: int, frame: object) -> None:
        self._received.append(number)
        handle_interrupt(self._received)
        for process in list(self.processes):
            if process.poll() is None:
                process.terminate()
