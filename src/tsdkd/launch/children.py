"""A launcher and its processes, which stop together, however one of them ends."""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from ..config.stop_signals import announce_stop
from ..errors import PreemptedError

_STARTED_BY = "TSDKD_STARTED_BY"  # in the environment of a process that tsdkd starts: which process did, and where
_FAILURE_FILE = "TSDKD_FAILURE_FILE"  # in their environment: where they say that they failed
_PR_SET_PDEATHSIG = 1


def started_by_this() -> dict[str, str]:
    """What the environment of a process says that is to stop with this one, which starts it."""
    return {_STARTED_BY: f"{os.getpid()}@{platform.node()}"}


@contextmanager
def collect_failures() -> Iterator[Path]:
    """Within it, processes that this one starts write the exit code of a failure into the file: a launcher that stops
    them doesn't tell it."""
    with TemporaryDirectory() as folder:
        os.environ[_FAILURE_FILE] = str(Path(folder, "exit_code"))
        try:
            yield Path(os.environ[_FAILURE_FILE])
        finally:
            del os.environ[_FAILURE_FILE]


def report_failure(exit_code: object) -> None:
    """Tell the launcher, if there is one, how this process failed."""
    path = os.environ.get(_FAILURE_FILE)
    if path and exit_code not in (0, PreemptedError.exit_code):
        with suppress(OSError):
            Path(path).write_text(str(exit_code))


def stop_with_launcher() -> None:
    """Have this process get SIGTERM, upon which a run saves and stops, once the launcher that started it is dead.

    Without effect where no launcher did, since a shell may end before what runs in its background, and on systems
    other than Linux.
    """
    parent = os.getppid()
    launcher, _, machine = os.environ.pop(_STARTED_BY, "").partition("@")
    is_ours = bool(launcher) and machine == platform.node()
    if sys.platform != "linux" or not (is_ours or _is_launcher(parent)):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent or (is_ours and not Path("/proc", launcher).exists()):  # it was dead before
        signal.raise_signal(signal.SIGTERM)


def stop_children() -> None:
    """End the processes that this one has started, by SIGTERM, and wait for them."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    psutil.wait_procs(children)


def handle_interrupt(received: Sequence[int]) -> None:
    """For a launcher's handler, with the signals so far: a first Ctrl-C is announced, a second ends everything."""
    if received[-1] == signal.SIGINT:
        if received.count(signal.SIGINT) > 1:
            _kill_descendants()
        announce_stop()


def _kill_descendants() -> NoReturn:
    """End this process, and all that it and they have started, at once."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + signal.SIGINT)


def _is_launcher(process: int) -> bool:
    """Whether it is `torchrun` or `accelerate launch`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    # accelerate tells a process that is alone its precision only, which somebody may have exported
    try:
        command = Path("/proc", str(process), "cmdline").read_bytes()
    except OSError:
        return False
    return "ACCELERATE_MIXED_PRECISION" in os.environ and b"accelerate" in command
