"""`tsdkd configs`."""

from collections.abc import Sequence

from ..run.presets import preset_paths
from .arguments import ArgumentParser


def main(argv: Sequence[str]) -> int:
    """List the presets: the name and the first comment line of each."""
    parser = ArgumentParser(prog="tsdkd configs", description="List the configurations that ship with tsdkd.")
    parser.add_argument("--path", action="store_true", help="print the path of each file, for example to copy it")
    args = parser.parse_args(argv)
    paths = preset_paths()
    width = max(len(path.name) for path in paths)
    for path in paths:
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(path if args.path else f"{path.name:<{width}}  {first}")
    return 0
