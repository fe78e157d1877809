"""Loads from a folder or the Hugging Face hub, with one-line errors.

Whether the hub responds is checked only once, so that a machine without access to it does not wait for retries.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets.config
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from ..config.coercion import shorten
from ..errors import ModelError, first_line
from ..files import read_small_file, require_regular_file

_FILE_TYPES = (".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".tiktoken", ".txt")
_MAX_JSON = 2**28  # bytes; the largest tokenizers have 2**25
_MAX_ADAPTER_CONFIG = 2**20  # bytes
INIT_KWARGS = {"model_name_or_path": "model_init_kwargs", "teacher_model_name_or_path": "teacher_model_init_kwargs"}
"""Field that names a model -> field with its keyword arguments of `from_pretrained`."""


@cache
def offline_reason() -> str | None:
    """Return why the hub can't be used, or None if it responds.

    If it does not respond, cached copies are used without requests, as with HF_HUB_OFFLINE=1.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # from the HTTP library, which depends on huggingface_hub's version
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
        return f"{constants.ENDPOINT} can't be reached: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def load_pretrained(
    load: Callable[..., Any], name: str, field: str, what: str, init_kwargs: Any = None, **kwargs: Any
) -> Any:
    """Call `load(name, **kwargs)` and convert its exceptions to one line that names the field.

    Args:
        load: a function such as `from_pretrained`.
        name: folder or hub id.
        field: the field that names the model.
        what: "model" or "tokenizer", for the message.
        init_kwargs: the user's part of `kwargs`, for the message.
        kwargs: keyword arguments of `load`.

    Raises:
        ModelError: `load` failed.
    """
    offline = None if os.path.exists(name) else offline_reason()
    try:
        _check_files(Path(name))
        return load(name, **kwargs)
    except Exception as error:  # OSError, ValueError, KeyError, errors of safetensors and tokenizers, ...
        if os.path.isfile(name):
            reason = "it is a file, expected a folder or a hub id"
        elif not os.path.isdir(name) and _is_hub_error(error):
            reason = "no such folder, and " + (f"not in the cache; {offline}" if offline else "not found on the hub")
        else:
            reason = " ".join(str(error).split())[:300] + (
                f" (with {INIT_KWARGS[field]} {init_kwargs})" if init_kwargs else ""
            )
        raise ModelError(f"{field}: can't load the {what} {name!r}: {reason}") from error


def _check_files(folder: Path) -> None:
    """Raise `ValueError` for files that would block the reader, or that are too large."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in _FILE_TYPES:
            try:
                require_regular_file(path)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from error
        if path.suffix == ".json" and path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path.name}: it is larger than {_MAX_JSON:,} bytes")
        if path.name.endswith(".index.json"):
            _check_shards(path)


def _check_shards(index: Path) -> None:
    """Raise `ValueError` if a weight index names files outside its folder. The loader reports other damage."""
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index.name}: a shard must be a file in the same folder, found {shorten(shard)}")


def read_adapter_base(folder: Path) -> str | None:
    """Return the base model of the adapter in a folder; None if there is no adapter. Raises `ValueError`."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        return str(json.loads(read_small_file(config, _MAX_ADAPTER_CONFIG))["base_model_name_or_path"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


def _is_hub_error(error: BaseException | None) -> bool:
    """Whether files couldn't be found or downloaded.

    False for a gated model or a missing revision, because the hub's messages are more helpful than ours.
    """
    while error is not None:
        if isinstance(error, GatedRepoError | RevisionNotFoundError):
            return False
        if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | HFValidationError):
            return True
        error = error.__cause__ or error.__context__
    return False
