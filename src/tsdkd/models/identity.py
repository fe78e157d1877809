"""Which weights a model has, whatever its name, its place and its files' times."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

_MAX_THREADS = 16
_WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that is there is loaded
_OTHERS = ("*.index.json", "config.json", "adapter_config.json")


def identify_model(name: str, config: PretrainedConfig) -> str:
    """A digest of a model's weights and configuration, the same for a folder and for a copy in the hub's cache.

    Args:
        name: folder or hub id, of which all files are here.
        config: the model's configuration, which knows the commit.

    Raises:
        OSError: a file can't be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
        except Exception:  # its cache is elsewhere, for instance
            return f"commit {commit}"
    files = [*_list_files(folder), *(path for base in _base_of_adapter(folder) for path in _list_files(base))]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
        digests = [(path.name, digest) for path, digest in zip(files, pool.map(_hash_file, files), strict=True)]
    return f"sha256 {hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]}"


def _list_files(folder: Path) -> list[Path]:
    weights = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    return [*weights, *(path for pattern in _OTHERS for path in sorted(folder.glob(pattern)))]


def _hash_file(path: Path) -> str:
    """SHA-256, which large files in the hub's cache have as their names."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _base_of_adapter(folder: Path) -> list[Path]:
    """The folder of the model that an adapter changes, where it is one."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return [Path(base)] if Path(base).is_dir() else []
    except (OSError, ValueError, TypeError, KeyError):
        return []
