"""Identifies a model by its weights, independent of its name, location and file times."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from .hub import read_adapter_base

_MAX_THREADS = 16
# files that `from_pretrained` loads, the first one that exists; {} stands for the variant
_SAFETENSORS = ("model{}.safetensors", "model.safetensors.index{}.json")
_PICKLES = ("pytorch_model{}.bin", "pytorch_model.bin.index{}.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def identify_model(name: str, config: PretrainedConfig, init_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a digest of the loaded weights and of config.json. It is the same for a folder and its copies.

    Args:
        name: folder or hub id, with all files available locally.
        config: the model's configuration, which contains the commit.
        init_kwargs: arguments of `from_pretrained`, which affect the files (`subfolder`, `variant`,
            `use_safetensors`).

    Raises:
        OSError: a file can't be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
        except Exception:  # e.g. the model is in another cache
            return f"commit {commit}"
    chosen = init_kwargs or {}
    folder = folder / str(chosen.get("subfolder") or "")
    files = [
        *_list_files(folder, chosen),
        *(path for base in _base_of_adapter(folder) for path in _list_files(base, {})),
    ]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        digests = [(path.name, digest) for path, digest in zip(files, pool.map(_hash_file, files), strict=True)]
    return f"sha256 {hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]}"


def _list_files(folder: Path, chosen: Mapping[str, Any]) -> list[Path]:
    """Return the files that are loaded; other files in the folder do not matter."""
    variant = f".{chosen['variant']}" if chosen.get("variant") else ""
    patterns = _PICKLES if chosen.get("use_safetensors") is False else (*_SAFETENSORS, *_PICKLES)
    names = [pattern.format(variant) for pattern in patterns]
    weights = [folder / name for name in names if (folder / name).is_file()][:1]
    if weights and weights[0].suffix == ".json":
        weights += [folder / name for name in sorted(set(json.loads(weights[0].read_bytes())["weight_map"].values()))]
    others = [*_ADAPTERS, "adapter_config.json", "config.json"]
    return [*weights, *(folder / name for name in others if (folder / name).is_file())]


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file. Large files in the hub's cache are named after it."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _base_of_adapter(folder: Path) -> list[Path]:
    """Return the folder of an adapter's base model, if it is a local folder."""
    try:
        base = read_adapter_base(folder)
    except ValueError:
        return []
    return [Path(base)] if base is not None and Path(base).is_dir() else []
