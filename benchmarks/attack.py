"""Hostile programs, damaged files, absurd data and badly timed accidents, with random variants: does everything hold?

    python benchmarks/attack.py [--minutes 10] [--seed 0] [--only sandbox runs]

Each kind of attack gets about the same time. A line for every kind: variants tried, and held. Exit code 1 if one did
not hold; each of those is printed with the command that repeats it.
"""

import argparse
import importlib
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

Attack = Callable[[random.Random, Path], None]
"""Tries one random variant in an empty folder. Raises `AssertionError`, or anything else, if it didn't hold."""

_AREAS = ("sandbox", "data", "reports", "runs")
sys.path.insert(0, str(Path(__file__).parent))


def main() -> int:
    """Attack until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=_AREAS, help="areas or kinds, e.g. sandbox, 'runs: two at once'")
    parser.add_argument("--variant", type=int, help="repeat this variant of the kinds, and stop")
    args = parser.parse_args()
    kinds = {name: attack for name, attack in _all_kinds().items() if {name, name.partition(":")[0]} & {*args.only}}
    tried, seconds, broken = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0), []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end and not (args.variant is not None and all(tried.values())):
        name = min(kinds, key=lambda kind: (tried[kind] > 0, seconds[kind]))
        variant = tried[name] if args.variant is None else args.variant
        start = time.monotonic()
        if not _holds(name, kinds[name], args.seed, variant):
            broken.append(name)
        tried[name] += 1
        seconds[name] += time.monotonic() - start
    for name, count in tried.items():
        print(f"{name:<56} {count:>6} tried {count - broken.count(name):>6} held {seconds[name]:>7.0f} s")
    print(f"{'all':<56} {sum(tried.values()):>6} tried {sum(tried.values()) - len(broken):>6} held")
    return int(bool(broken))


def _all_kinds() -> dict[str, Attack]:
    modules = {area: importlib.import_module(f"attacks.{area}") for area in _AREAS}
    return {f"{area}: {name}": attack for area, module in modules.items() for name, attack in module.ATTACKS.items()}


def _holds(name: str, attack: Attack, seed: int, variant: int) -> bool:
    try:
        with tempfile.TemporaryDirectory() as folder:
            attack(random.Random(f"{seed} {name} {variant}"), Path(folder))
    except Exception:
        print(f"DID NOT HOLD: python benchmarks/attack.py --seed {seed} --only '{name}' --variant {variant}")
        traceback.print_exc(file=sys.stdout)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
