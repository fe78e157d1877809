"""`tsdkd reproduce`."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, install_hint
from .arguments import ArgumentParser, int_at_least, positive_float


def main(argv: Sequence[str]) -> int:
    """Run one of the papers' small experiments."""
    parser = ArgumentParser(
        prog="tsdkd reproduce",
        description="Run one of the papers' small experiments and compare the numbers with the paper's.",
        allow_abbrev=False,
    )
    experiments = parser.add_subparsers(dest="experiment", required=True)
    experiments.add_parser("tsdkd-gradient", help="gradients of TSD-KD's gate (App. A.2)", allow_abbrev=False)
    toy = experiments.add_parser(
        "eopd-toy", help="EOPD's toy example (Sec. 3.2, Table 1, Figures 1 and 6)", allow_abbrev=False
    )
    toy.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("runs/eopd_toy"),
        help="folder for the plots; default: %(default)s",
    )
    toy.add_argument(
        "--seeds",
        type=int_at_least(1),
        metavar="N",
        default=3,
        help="number of random seeds; default: %(default)s, as in the paper",
    )
    toy.add_argument(
        "--learning_rate",
        type=positive_float,
        metavar="RATE",
        default=0.2,
        help="the paper doesn't give it; default: %(default)s",
    )
    toy.add_argument(
        "--steps",
        type=int_at_least(25),
        metavar="N",
        default=1000,
        help="optimizer steps, which the paper doesn't give; default: %(default)s",
    )
    args = parser.parse_args(argv)
    if args.experiment == "tsdkd-gradient":
        from ..reproduce import tsdkd_gradient

        tsdkd_gradient.reproduce()
        return 0
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError([f"eopd-toy's plots need matplotlib; {install_hint('report')}"]) from error
    from ..files import ensure_dir
    from ..reproduce import eopd_toy

    ensure_dir(args.output_dir)
    eopd_toy.reproduce(args.output_dir, args.seeds, args.learning_rate, args.steps)
    return 0
