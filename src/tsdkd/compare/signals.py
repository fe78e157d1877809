"""A cluster's signals, handed on to the processes that train or generate."""

import signal
import subprocess
from collections.abc import Sequence

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class SignalForwarder:
    """Within it, SIGTERM and SIGUSR1 go to the running processes, which save and stop. For the main thread.

    Args:
        processes: may grow meanwhile.

    Attributes:
        has_received_signal: whether one came.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes, self.has_received_signal = processes, False

    def __enter__(self) -> "SignalForwarder":
        self.previous_handlers = {n: signal.signal(n, self._forward) for n in FORWARDED_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        self.has_received_signal = True
        for process in list(self.processes):
            if process.poll() is None:
                process.send_signal(number)
