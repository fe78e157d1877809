"""`tsdkd plan`."""

from collections.abc import Sequence

from .arguments import build_run_parser, int_at_least, positive_float

_EPILOG = """The estimate assumes completions of full length. It reads the models' configurations only: no weights are
loaded, and no GPU is needed.
example:
  tsdkd plan --config qwen25_14b_to_1p5b.yaml --gpus 8 --gpu_gib 80"""


def main(argv: Sequence[str]) -> int:
    """Print the memory estimate of a configuration."""
    about = "Estimate the memory that a configuration needs on each GPU, and find the placement that fits."
    usage = "[--gpus N] [--gpu_gib GIB] "
    parser = build_run_parser("plan", about, _EPILOG, usage)
    parser.add_argument(
        "--gpus",
        type=int_at_least(1),
        metavar="N",
        help="number of GPUs; default: num_processes, else the visible GPUs, else 8",
    )
    parser.add_argument(
        "--gpu_gib",
        type=positive_float,
        metavar="GIB",
        help="memory of one GPU, GiB; default: that of the visible GPUs, else 80",
    )
    args, flags = parser.parse_known_args(argv)
    parser.refuse_misspelled(flags)

    from ..config.console import PlainConsole
    from ..launch.placement import plan  # torch from here on

    console = PlainConsole()
    for part in plan(args.config, flags, args.gpus, args.gpu_gib):
        console.print(part, soft_wrap=isinstance(part, str))  # a command must stay one line, to be copied
    return 0
