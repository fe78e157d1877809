"""Folders and files that are written: one place, one error for what the system says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import OutputDirError, TSDKDError


def ensure_dir(folder: Path, field: str = "output_dir") -> None:
    """Create a folder and its parents. Raises `OutputDirError`."""
    with wrap_os_errors(folder, field, "made"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_for_append(path: Path, field: str = "output_dir") -> Iterator[TextIO]:
    """A text file to append to; its folder is made. Raises `OutputDirError`, also for what fails while it is open."""
    with wrap_os_errors(path, field, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is moved to `path` at the end, so that `path` is complete or unchanged.

    The folder of `path` is made. Raises `OutputDirError`.
    """
    with wrap_os_errors(path, action="written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is whole or as before; its folder is made. Raises `OutputDirError`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def has_text(path: Path, text: str) -> bool:
    """Whether a file can be read, and holds this text."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def require_empty_dir(folder: Path) -> None:
    """Raise `OutputDirError` if the folder exists and isn't empty."""
    require_dir_path(folder)
    if folder.is_dir() and (present := sorted(path.name for path in folder.iterdir())):
        raise OutputDirError(f"output_dir: {folder} holds files already ({present[0]}, …); choose another")


@contextmanager
def wrap_os_errors(path: Path, field: str = "output_dir", action: str = "written or read") -> Iterator[None]:
    """Turn an `OSError` within the block into a one-line `OutputDirError`."""
    try:
        yield
    except TSDKDError:  # some are an OSError too
        raise
    except OSError as error:
        raise OutputDirError(f"{field}: {path} can't be {action}: {error.strerror or error}") from error


def iter_whole_lines(path: Path, prefix: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """The lines of a file that is only ever appended to, with their numbers from 1.

    A last line without its end was cut off in the middle of a write. It isn't yielded, and once all others have been
    taken, it is removed from the file; a caller that refuses the file before has changed nothing.

    Args:
        path: the file.
        prefix: how each line begins. Only a last line that begins so can have been cut off; another one is yielded.
    """
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line.startswith(prefix[: len(line)]):
                break
            yield number, line
            size += len(line)
    if size < path.stat().st_size:
        os.truncate(path, size)


def require_dir_path(folder: Path) -> None:
    """Raise `OutputDirError` if the path, or one of its parents, is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise OutputDirError(f"output_dir: {place} is a file, expected a folder")
