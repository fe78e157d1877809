"""Writes, verifies and deletes checkpoints. A checkpoint is either complete or does not exist.

A checkpoint is first written under a hidden name. Its files are hashed and synced to disk, and a manifest lists them.
Then the main process renames it, between barriers. When a run is resumed, the checkpoint must match its manifest, byte
for byte.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.logs import get_logger
from ..errors import CheckpointError, ResumeError

logger = get_logger(__name__)
MANIFEST = "manifest.json"
_PARTIAL_PREFIX, _DELETED_PREFIX = ".writing-", ".deleting-"
_LEFTOVER = re.compile(rf"\.(writing|deleting)-{PREFIX_CHECKPOINT_DIR}-\d+")
_CHECKPOINT_PATTERN = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_PACKAGES = ("tsdkd", "torch", "transformers", "trl", "accelerate")


@dataclass
class Manifest:
    """The contents of a checkpoint, for verification.

    Attributes:
        step: number of completed optimizer steps.
        num_processes: number of processes that wrote the checkpoint.
        versions: package -> version, for the main dependencies.
        files: path in the checkpoint -> (bytes, SHA-256).
    """

    step: int
    num_processes: int
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]


def write_checkpoint(output_dir: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Create `checkpoint-STEP` in the output directory, which all processes must share.

    Args:
        output_dir: the output directory.
        step: number of completed optimizer steps.
        write_files: function that every process calls with the folder to write to.

    Returns:
        The complete checkpoint folder.

    Raises:
        CheckpointError: a file can't be written. The earlier checkpoints are intact.
    """
    state, final = PartialState(), output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    partial = output_dir / f"{_PARTIAL_PREFIX}{final.name}"
    try:
        if state.is_main_process:
            partial.mkdir(parents=True)
        state.wait_for_everyone()
        write_files(partial)
        state.wait_for_everyone()
        entries = _map_files(_fsync_and_hash, partial, _list_files(partial))
        if state.is_main_process:
            versions = {name: version(name) for name in _PACKAGES}
            _write_manifest(partial / MANIFEST, Manifest(step, state.num_processes, versions, entries))
            _fsync_dirs(partial)
            _delete_checkpoint(final)  # at most a damaged one exists, which was skipped on resume
            partial.rename(final)
            _fsync(output_dir)
    except Exception as error:
        # safetensors and torch raise their own exceptions if the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final} can't be written: {' '.join(str(error).split())[:300]}; earlier checkpoints are intact; "
            "continue with --resume true"
        ) from error
    state.wait_for_everyone()
    return final


def get_last_valid_checkpoint(output_dir: Path) -> Path:
    """Return the newest checkpoint that passes verification; log those that are skipped. All processes must call it.

    Raises:
        ResumeError: there is no valid checkpoint.
    """
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning(f"resume: skipped {folder}: {problem}")
    raise ResumeError(f"resume: {output_dir} has no valid checkpoint to resume from ({len(folders)} found)")


def verify_checkpoint(folder: Path) -> None:
    """Verify a checkpoint. All processes must call it. Raises `ResumeError`."""
    problem = find_damage(folder)
    if problem:
        raise ResumeError(f"resume_from_checkpoint: can't resume from {folder}: {problem}")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return all checkpoints in a run's folder, oldest first, without verification."""
    found = (
        (_CHECKPOINT_PATTERN.fullmatch(path.name), path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    )
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_damage(folder: Path) -> str | None:
    """Return why a checkpoint can't be used, or None if it can.

    All processes must call it; each reads a part of the files.

    Raises:
        ResumeError: a different number of processes wrote the checkpoint.
    """
    state = PartialState()
    found = _read_manifest(folder)
    if isinstance(found, str):
        return found
    if found.num_processes != state.num_processes:
        raise ResumeError(
            f"resume: {folder} was written by {found.num_processes} process{'es' * (found.num_processes > 1)}, found "
            f"{state.num_processes}; start the same number of processes"
        )
    present = _list_files(folder)
    missing = sorted(set(found.files) - set(present))
    if missing:
        return f"missing {', '.join(missing[:3])}"
    now = _map_files(_try_hash_file, folder, sorted(found.files))
    changed = [name for name in now if now[name] != tuple(found.files[name])]
    if changed:
        return f"{', '.join(changed[:3])}: changed since written"
    return None


def _read_manifest(folder: Path) -> Manifest | str:
    """Return the manifest, or the reason why it can't be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if digest != _hash_manifest(content):
            return f"{MANIFEST}: changed since written"
        return Manifest(**content)
    except FileNotFoundError:
        return f"missing {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read, or is from another version"


def rotate_checkpoints(newest: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints until `keep` are left.

    Never deletes `newest` or `best`. A checkpoint is removed atomically.
    """
    if not keep:
        return
    folders = list_checkpoints(newest.parent)
    protected = {newest.name, Path(best or "").name}  # a damaged checkpoint may have a higher number
    surplus = [folder for folder in folders if folder.name not in protected]
    for folder in surplus[: max(0, len(folders) - keep)]:
        _delete_checkpoint(folder)


def remove_partial_checkpoints(output_dir: Path) -> None:
    """Remove the leftovers of an interrupted save or rotation."""
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if is_leftover(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a folder with this name was left by an interrupted save or rotation."""
    return _LEFTOVER.fullmatch(name) is not None


def _delete_checkpoint(folder: Path) -> None:
    """Rename a checkpoint, so that it no longer counts as one, then delete it."""
    if folder.exists():
        doomed = folder.with_name(f"{_DELETED_PREFIX}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files except the manifest."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def _map_files(function: Callable[[Path], Any], folder: Path, names: list[str]) -> dict[str, Any]:
    """Return name -> `function(file)`. Each process calls the function for a part of the files."""
    state = PartialState()
    own = [(name, function(folder / name)) for name in names[state.process_index :: state.num_processes]]
    return dict(sorted(gather_object(own)))


def _fsync_and_hash(path: Path) -> tuple[int, str]:
    """Sync a file to disk and return its size in bytes and SHA-256."""
    _fsync(path)
    return _hash_file(path)


def _hash_file(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _try_hash_file(path: Path) -> tuple[int, str] | None:
    """Like `_hash_file`, but return None if the file can't be read, because the other processes wait for a result."""
    try:
        return _hash_file(path)
    except OSError:
        return None


def _hash_manifest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = json.loads(json.dumps(asdict(manifest)))
    path.write_text(json.dumps({"sha256": _hash_manifest(content), **content}, indent=1), encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_dirs(folder: Path) -> None:
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _fsync(path)
