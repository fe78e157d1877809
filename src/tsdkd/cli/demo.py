"""`tsdkd demo`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .arguments import ArgumentParser, say_how_to_continue

_EPILOG = """examples:
  tsdkd demo
  tsdkd demo --method eopd
  tsdkd demo --alpha 0 --entropy_weight 0 --gate false     (plain GKD)
All options of `tsdkd train` work. The configurations are the shipped demo.yaml and demo_eopd.yaml."""
_PRESETS = {"tsd-kd": "demo.yaml", "eopd": "demo_eopd.yaml"}


def main(argv: Sequence[str]) -> int:
    """Evaluate, distill and evaluate again on the embedded task."""
    parser = ArgumentParser(
        prog="tsdkd demo",
        description="Watch a tiny student learn to plan a walk from a tiny teacher, on a CPU, without any download.",
        epilog=_EPILOG,
        usage="tsdkd demo [--method tsd-kd|eopd] [--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--method", choices=_PRESETS, default="tsd-kd", help="default: %(default)s")
    args, flags = parser.parse_known_args(argv)

    from ..demo.run_demo import run_demo
    from ..run.arguments import parse_arguments  # torch from here on
    from ..run.config_file import read_flags

    given = read_flags(flags, [])
    if "output_dir" not in given:
        flags += ["--output_dir", str(_next_free_dir(Path("runs/demo")))]
    if "record_steps" not in given:
        flags += ["--record_steps", "30"]  # the report's tokens
    with say_how_to_continue("demo", "--method", args.method, *flags):
        run_demo(parse_arguments(_PRESETS[args.method], flags))
    return 0


def _next_free_dir(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ...: a demo is run more than once."""
    candidates = (folder.with_name(f"{folder.name}-{n}") if n > 1 else folder for n in range(1, 10_000))
    return next(c for c in candidates if not c.exists())
