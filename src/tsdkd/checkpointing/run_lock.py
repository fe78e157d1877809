"""One output directory, one run: the run's first process locks a file there until the run ends or the process dies."""

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..config.logs import get_logger
from ..errors import OutputDirError, TSDKDError
from ..files import wrap_os_errors

logger = get_logger(__name__)
LOCK_NAME = "_tsdkd.lock"  # `Trainer` doesn't upload what begins with an underscore
_descriptors: set[int] = set()  # of this process's locks


class RunLock:
    """The lock of an output directory. All processes call its methods, except where they say otherwise.

    Args:
        folder: the output directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._is_held, self._descriptor = folder, False, -1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, and give it back unless it was held before. Raises `OutputDirError`, on all processes."""
        was_held = self._is_held
        self.acquire()
        try:
            yield
        finally:
            if not was_held:
                self.close()

    def acquire(self, only_beside: str = "") -> None:
        """Take the lock, unless it is held.

        Args:
            only_beside: a file's name; nothing is done, or made, where the directory doesn't have it.

        Raises:
            OutputDirError: another run has it, or the directory can't be written; on all processes.
        """
        if not self._is_held:
            self._is_held = on_main_process(lambda: self._lock_beside(only_beside))

    def close(self) -> None:
        """Let others run here. Without effect where the lock isn't held."""
        self._is_held = False
        if self._is_in_place():
            with suppress(OSError):
                self._path.unlink()
        self._close_file()

    def restore(self) -> None:
        """For the first process: lock again where the file was deleted, or moved away, in mid-run.

        Raises:
            OutputDirError: another run has begun meanwhile.
        """
        if self._is_held and not self._is_in_place():
            self._close_file()
            self._lock()

    @property
    def _path(self) -> Path:
        return self.folder / LOCK_NAME

    def _lock_beside(self, name: str) -> bool:
        if name and not (self.folder / name).exists():
            return False
        self._lock()
        return True

    def _lock(self) -> None:
        with wrap_os_errors(self.folder, action="written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try_lock():  # the file that was locked has just been deleted, by a run that ended
                self._close_file()

    def _try_lock(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        _descriptors.add(self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "unknown"
            self._close_file()
            raise OutputDirError(
                f"output_dir: another run is in {self.folder} ({owner}); wait until it has ended, or choose another"
            ) from None
        except OSError as error:
            logger.warning(f"output_dir: no lock in {self.folder} ({error.strerror}): don't start a second run there")
        if not self._is_in_place():
            return False
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        except OSError:  # the disk is full
            self._path.unlink()
            self._close_file()
            raise
        return True

    def _is_in_place(self) -> bool:
        """Whether the file that is locked is the one in the directory."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self._path))
        except OSError:
            return False

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _close_in_child() -> None:
    """A process that was forked, to load data for instance, may outlive the run, and would keep its locks."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def on_main_process(function: Callable[[], Any]) -> Any:
    """What `function` returns on the first process, or the `TSDKDError` that it raises there, on all processes."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except TSDKDError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
