"""Data sets from the hub, from local files, from folders of files, and from reasoning-gym."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError

from ..errors import DataError
from ..files import load_in_child_first, require_readable_data
from ..models.hub import offline_reason
from .reasoning_gym import generate_split, is_reasoning_gym

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_split(name: str, config: str | None, split: str, field: str = "dataset_name") -> Dataset:
    """A split of a local folder, a hub data set or a task of reasoning-gym; a local file has only the split "train".

    Raises:
        DataError: missing, unreadable, without this split, or empty.
    """
    path = Path(name)
    if is_reasoning_gym(name):
        if config is not None:
            raise DataError(f"dataset_config: {config!r} has no effect, the options of a task are part of its name")
        return generate_split(name, split, field)
    offline = None
    try:
        if path.exists():
            require_readable_data(path)
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise DataError(
                    f"{field}: {name} must end in {', '.join(_FORMATS)}, found {path.suffix or 'no ending'!r}"
                )
            if split != "train":
                raise DataError(f"{field}: {name} is a single file, it has no split {split!r}")
            rows = load_in_child_first(
                lambda: load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
            )
        elif not path.exists() and (path.suffix in _FORMATS or path.is_absolute() or name.startswith(".")):
            raise DataError(f"{field}: there is no file {name!r}")
        elif path.exists():
            _require_own_files(path, config)
            folder = os.path.abspath(path)  # or one that is called json would be taken for a reader
            rows = load_in_child_first(lambda: load_dataset(folder, config, split=split))
        else:
            offline = offline_reason()
            rows = load_dataset(name, config, split=split)
    except DataError:
        raise
    except Exception as error:  # the readers raise whatever their formats raise
        if isinstance(error, (DatasetNotFoundError, ConnectionError, FileNotFoundError)) and not path.exists():
            reason = f"there is no copy; {offline}" if offline else "the hub doesn't have it"
            raise DataError(f"{field}: {name!r} is no local file, and {reason}") from error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or f"it is empty, or has no rows ({type(cause).__name__})"
        raise DataError(f"{field}: {name} (split {split}) can't be read: {reason}") from error
    if len(rows) == 0:
        raise DataError(f"{field}: {name} has no rows")
    return rows.select_columns([column for column, feature in rows.features.items() if not _opens_files(feature)])


def _require_own_files(folder: Path, config: str | None) -> None:
    """Raise `ValueError` if a folder's README.md says that files elsewhere are its data."""
    places = [Path(os.path.abspath(folder)), Path(os.path.realpath(folder))]
    files = load_dataset_builder(str(places[0]), config).config.data_files or {}
    for file in (str(file) for some in files.values() for file in some):  # a URL, of any protocol, is no file of it
        if not any(Path(os.path.normpath(file)).is_relative_to(place) for place in places):
            raise ValueError(f"{file[:200]!r} isn't in the folder")


def _opens_files(feature: Any) -> bool:
    """Whether reading a value opens the file that it names: an image, a sound, a video."""
    if isinstance(feature, dict):
        return any(_opens_files(part) for part in feature.values())
    if type(feature).__name__ == "Json":  # which older versions of datasets don't have
        return False
    return hasattr(feature, "decode_example") or _opens_files(getattr(feature, "feature", {}))
