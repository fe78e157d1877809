"""Read and write files and folders safely; system errors become one-line errors that name the field and the file."""

import errno
import fcntl
import json
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from .errors import DataError, OutputDirError, TSDKDError, first_line

T = TypeVar("T")

_PACKAGE = "tsdkd://"
_MAX_LINE = 2**26  # bytes
_MAX_FILES = 100_000
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def ensure_dir(folder: Path, field: str = "output_dir") -> None:
    """Create a folder and its parents. Raises `OutputDirError`."""
    with wrap_os_errors(folder, field, "made"):
        folder.mkdir(parents=True, exist_ok=True)


def require_readable_data(path: Path) -> None:
    """Raise `ValueError` for files that would block a reader, such as pipes, and for too many files.

    Args:
        path: a file, or a folder with files.
    """
    found = list(islice(path.rglob("*"), _MAX_FILES + 1)) if path.is_dir() else [path]
    if len(found) > _MAX_FILES:
        raise ValueError(f"it has more than {_MAX_FILES:,} files")
    for file in sorted(file for file in found if not file.is_dir()):
        try:
            require_regular_file(file)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None


def load_in_child_first(load: Callable[[], T]) -> T:
    """Call `load` in a forked process first. Then call it in this process, where it uses the filled cache.

    Some files crash their reader (deeply nested JSON crashes pyarrow). Such a crash must not end this process.

    Raises:
        ValueError: the reader crashed. Exceptions from `load` itself are passed on.
    """
    if sys.platform != "linux":
        return load()
    with warnings.catch_warnings():
        # Python 3.12 warns about forking with threads; the child needs none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        with suppress(BaseException):
            load()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ValueError(f"the file reader crashed ({signal.Signals(os.WTERMSIG(status)).name})")
    return load()


@contextmanager
def open_for_append(path: Path, field: str = "output_dir") -> Iterator[Callable[[str], None]]:
    """Yield a function that appends text to a file, either all of it or nothing. Creates the folder.

    Raises:
        OutputDirError: the path is not a regular file or can't be written. System errors within the block are
            converted to this error too.
    """
    with wrap_os_errors(path, field, "written"):
        _prepare_writing(path, field)
        with path.open("ab", buffering=0) as file:
            yield partial(_append, file)


@contextmanager
def hold_file(path: Path, field: str = "output_dir") -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if missing.

    Raises:
        OutputDirError: another process holds the lock, or the path is not a regular file or can't be written.
    """
    with wrap_os_errors(path, field, "written"):
        _prepare_writing(path, field)
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputDirError(f"{field}: another process is writing {path}; choose another file") from None
            except OSError:
                pass  # a file system without locks
            yield


def _prepare_writing(path: Path, field: str) -> None:
    """Create the file's folder. Raises `OutputDirError` if the path exists and is not a regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.exists():
            require_regular_file(path)
    except ValueError as error:
        raise OutputDirError(f"{field}: {path} can't be written: {error}") from error


def _append(file: FileIO, text: str) -> None:
    """Append in one system call, which a signal can't split. If the disk is full, remove the part that was written."""
    content, end = text.encode(), file.seek(0, os.SEEK_END)
    if file.write(content) < len(content):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def atomic_path(path: Path, field: str = "output_dir") -> Iterator[Path]:
    """Yield a temporary path that is moved to `path` at the end, so that `path` is either complete or unchanged.

    Creates the folder of `path`. A link is replaced, not followed. Raises `OutputDirError`.
    """
    with wrap_os_errors(path, field, "written"):
        _prepare_writing(path, field)
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)  # it may be a link
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_atomically(path: Path, text: str, field: str = "output_dir") -> None:
    """Write a text file atomically: it is complete or unchanged. Creates the folder. Raises `OutputDirError`."""
    with atomic_path(path, field) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def has_text(path: Path, text: str) -> bool:
    """Whether a file can be read and its content equals `text`."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def require_empty_dir(folder: Path) -> None:
    """Raise `OutputDirError` if the folder exists and isn't empty."""
    require_dir_path(folder)
    if folder.is_dir() and (present := sorted(path.name for path in folder.iterdir())):
        raise OutputDirError(f"output_dir: {folder} is not empty ({present[0]}, …); choose another directory")


@contextmanager
def wrap_os_errors(path: Path, field: str = "output_dir", action: str = "written or read") -> Iterator[None]:
    """Turn an `OSError` within the block into a one-line `OutputDirError`."""
    try:
        yield
    except TSDKDError:  # some of them are OSErrors
        raise
    except OSError as error:
        raise OutputDirError(f"{field}: {path} can't be {action}: {error.strerror or error}") from error


def require_regular_file(path: Path) -> None:
    """Raise `ValueError` for a folder, pipe, device or socket, without opening it; `OSError` if nothing is there."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'not a file')}, expected a file")


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`. Raises `ValueError` with the reason if it can't."""
    try:
        require_regular_file(path)
        with open(path, "rb", opener=_open_without_waiting) as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if content is None:  # a file in /proc without content yet
        raise ValueError("it has no content yet, expected a regular file")
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def iter_whole_lines(path: Path, prefix: bytes, field: str = "output_dir") -> Iterator[tuple[int, bytes]]:
    """Yield the lines of an append-only JSONL file with their numbers, from 1, and repair an incomplete last line.

    The file is changed only after the caller has accepted all lines before the last one, and at least one. Then a
    truncated last line is removed; a complete last line without a line end gets one.

    Args:
        path: the file.
        prefix: the beginning of each line. A last line with another beginning is not truncated; it is yielded.
        field: the field that names the file.

    Raises:
        OutputDirError: the file has only one line, and it is truncated, so that its origin is unknown.
    """
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            if len(line) < _MAX_LINE and not line.endswith(b"\n") and line.startswith(prefix[: len(line)]):
                break
            yield number, line
            size += len(line)
        else:
            return
    if _is_json(line):
        yield number, line
        with path.open("ab") as file:
            file.write(b"\n")
    elif number == 1:
        raise OutputDirError(f"{field}: {path} has only one, truncated line; delete it or choose another file")
    else:
        os.truncate(path, size)


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text, "it")
    except DataError:
        return False
    return True


def require_dir_path(folder: Path) -> None:
    """Raise `OutputDirError` if the path, or one of its parents, is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise OutputDirError(f"output_dir: {place} is a file, expected a folder")


def read_bounded(path: Path, max_mib: float) -> bytes:
    """Call `read_small_file` for a file that tsdkd writes. Raises `DataError` that names the file."""
    try:
        return read_small_file(path, int(max_mib * 2**20))
    except ValueError as error:
        raise DataError(f"{path} can't be read: {error}") from error


def parse_json(content: bytes | str, name: object) -> Any:
    """Parse JSON, including Python's NaN and Infinity. Raises `DataError`, whose message begins with `name`."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise DataError(f"{name} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{name} is damaged: it is not valid JSON: {first_line(error)}") from error


def resolve_path(value: Any) -> Any:
    """Resolve `tsdkd://demo/student` to the file or folder in the package. Returns anything else unchanged."""
    if isinstance(value, str) and value.startswith(_PACKAGE):
        return str(Path(__file__).parent / value.removeprefix(_PACKAGE))
    return value


def shorten_path(path: str) -> str:
    """The inverse of `resolve_path`, for messages."""
    folder = str(Path(__file__).parent)
    return f"{_PACKAGE}{path.removeprefix(folder).lstrip(os.sep)}" if path.startswith(f"{folder}{os.sep}") else path
