"""Makes a launcher and its processes stop together, no matter which ends first or why."""

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

_STARTED_BY = "TSDKD_STARTED_BY"  # environment variable of a started process: pid and host of its launcher
_FAILURE_FILE = "TSDKD_FAILURE_FILE"  # environment variable: file for a failed process's exit code
_PR_SET_PDEATHSIG = 1


def started_by_this() -> dict[str, str]:
    """Return environment variables for a process that must stop when this process stops."""
    return {_STARTED_BY: f"{os.getpid()}@{platform.node()}"}


@contextmanager
def collect_failures() -> Iterator[Path]:
    """Yield a file to which processes started within the block write the exit code if they fail.

    A launcher that stops its processes does not report their exit codes.
    """
    with TemporaryDirectory() as folder:
        os.environ[_FAILURE_FILE] = str(Path(folder, "exit_code"))
        try:
            yield Path(os.environ[_FAILURE_FILE])
        finally:
            del os.environ[_FAILURE_FILE]


def report_failure(exit_code: object) -> None:
    """Report this process's failure to the launcher, if there is one."""
    path = os.environ.get(_FAILURE_FILE)
    if path and exit_code not in (0, PreemptedError.exit_code):
        with suppress(OSError):
            Path(path).write_text(str(exit_code))


def stop_with_launcher() -> None:
    """Make the system send SIGTERM to this process when its launcher dies, so that the run saves and stops.

    Has no effect if the parent is not a launcher, because a shell may exit before its background jobs, and on systems
    other than Linux.
    """
    parent = os.getppid()
    launcher, _, machine = os.environ.pop(_STARTED_BY, "").partition("@")
    is_ours = bool(launcher) and machine == platform.node()
    if sys.platform != "linux" or not (is_ours or _is_launcher(parent)):
        return
    end_with_parent()
    if os.getppid() != parent or (is_ours and not Path("/proc", launcher).exists()):  # the launcher is already dead
        signal.raise_signal(signal.SIGTERM)


def end_with_parent() -> None:
    """Make the system end this process when its parent dies. For `preexec_fn`; has no effect except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def stop_children() -> None:
    """Send SIGTERM to all child processes and wait for them."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    psutil.wait_procs(children)


def handle_interrupt(received: Sequence[int]) -> None:
    """Handle Ctrl-C in a launcher, given all signals so far: announce the first one, kill everything at the second."""
    if received[-1] == signal.SIGINT:
        if received.count(signal.SIGINT) > 1:
            _kill_descendants()
        announce_stop()


def _kill_descendants() -> NoReturn:
    """Kill all descendants of this process, then end it at once."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + signal.SIGINT)


def _is_launcher(process: int) -> bool:
    """Whether the process is `torchrun` or `accelerate launch`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    # accelerate sets only its precision variable for a single process, and a user may have exported it
    try:
        command = Path("/proc", str(process), "cmdline").read_bytes()
    except OSError:
        return False
    return "ACCELERATE_MIXED_PRECISION" in os.environ and b"accelerate" in command
