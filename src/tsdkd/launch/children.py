"""A launcher and its processes, which stop together, however one of them ends."""

import ctypes
import os
import platform
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_STARTED_BY = "TSDKD_STARTED_BY"  # in the environment of a process that tsdkd starts: which process did, and where
_PR_SET_PDEATHSIG = 1


def started_by_this() -> dict[str, str]:
    """What the environment of a process says that is to stop with this one, which starts it."""
    return {_STARTED_BY: f"{os.getpid()}@{platform.node()}"}


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


def kill_descendants() -> NoReturn:
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
