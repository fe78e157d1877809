"""Allows only one run per output directory: its main process locks a file there until the run or the process ends."""

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
LOCK_NAME = "_tsdkd.lock"  # `Trainer` does not upload files that begin with an underscore
_descriptors: set[int] = set()  # file descriptors of this process's locks


class RunLock:
    """The lock of an output directory. All processes must call its methods, unless stated otherwise.

    Args:
        folder: the output directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._is_held, self._descriptor = folder, False, -1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock within the block, unless it is already held. Raises `OutputDirError` on all processes."""
        was_held = self._is_held
        self.acquire()
        try:
            yield
        finally:
            if not was_held:
                self.close()

    def acquire(self, only_beside: str = "") -> None:
        """Acquire the lock, unless it is already held.

        Args:
            only_beside: a file name; if given, do nothing unless the directory contains this file.

        Raises:
            OutputDirError: another run holds the lock, or the directory can't be written. Raised on all processes.
        """
        if not self._is_held:
            self._is_held = on_main_process(lambda: self._lock_beside(only_beside))

    def close(self) -> None:
        """Release the lock. Has no effect if the lock is not held."""
        self._is_held = False
        if self._is_in_place():
            with suppress(OSError):
                self._path.unlink()
        self._close_file()

    def restore(self) -> None:
        """Lock again if the file was deleted or moved during the run. Call it only on the main process.

        Raises:
            OutputDirError: another run has started in the meantime.
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
            while not self._try_lock():  # a run that ended has just deleted the locked file
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
                f"output_dir: another run is using {self.folder} ({owner}); wait until it ends, or choose another "
                "directory"
            ) from None
        except OSError as error:
            logger.warning(f"output_dir: can't lock {self.folder} ({error.strerror}); don't start a second run there")
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
        """Whether the locked file is still the one in the directory."""
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
    """Close the lock files in a forked process, which may outlive the run, e.g. a data loader's worker."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call `function` on the main process. Return its result, or raise its `TSDKDError`, on all processes."""
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
