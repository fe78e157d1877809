"""The configurations that ship with the package."""

from importlib import resources
from pathlib import Path


def preset_paths() -> list[Path]:
    """Return the shipped YAML files, sorted by name."""
    folder = Path(str(resources.files("tsdkd").joinpath("configs")))
    return sorted(folder.glob("*.yaml"))


def preset_names() -> list[str]:
    """Return the names of the shipped configurations, without `.yaml`."""
    return [path.stem for path in preset_paths()]


def find_preset(name: str) -> Path | None:
    """Return the path of the preset `name` (with or without `.yaml`), or None."""
    return next((p for p in preset_paths() if name in (p.stem, p.name)), None)
