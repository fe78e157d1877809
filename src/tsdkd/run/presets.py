"""The configurations that ship with the package."""

from importlib import resources
from pathlib import Path


def preset_paths() -> list[Path]:
    """The shipped YAML files, by name."""
    folder = Path(str(resources.files("tsdkd").joinpath("configs")))
    return sorted(folder.glob("*.yaml"))


def preset_names() -> list[str]:
    """Their names, without the ending."""
    return [path.stem for path in preset_paths()]


def find_preset(name: str) -> Path | None:
    """The preset called `name` (with or without .yaml), if there is one."""
    return next((p for p in preset_paths() if name in (p.stem, p.name)), None)
