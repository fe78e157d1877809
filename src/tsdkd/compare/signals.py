"""A cluster's or a terminal's signals, handed on to the processes that train or generate."""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack

from ..config.stop_signals import announce_stop, handle_stop_signals
from ..launch.children import kill_descendants


class SignalForwarder:
    """Within it, a signal that stops a run goes to the running processes, as SIGTERM: they save and stop. A second
    Ctrl-C kills them. For the main thread.

    Args:
        processes: may grow meanwhile.

    Attributes:
        has_received_signal: whether one came.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes, self.has_received_signal = processes, False
        self._num_interrupts = 0

    def __enter__(self) -> "SignalForwarder":
        self._handlers = ExitStack()
        self._handlers.enter_context(handle_stop_signals(self._forward))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _forward(self, number: int, frame: object) -> None:
        self.has_received_signal = True
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                kill_descendants()
            announce_stop()
        for process in list(self.processes):
            if process.poll() is None:
                process.terminate()
