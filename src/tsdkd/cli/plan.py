"""`tsdkd plan`."""

from collections.abc import Sequence

from .arguments import build_run_parser, int_at_least, positive_float

_EPILOG = """The estimate is for full-length completions. It needs the models' configurations, no weights and no GPU.
example:
  tsdkd plan --config qwen25_14b_to_1p5b.yaml --gpus 8 --gpu_gib 80"""


def main(argv: Sequence[str]) -> int:
    """Print what a configuration takes."""
    about = "What a configuration takes on each GPU, and which placement fits."
    usage = "[--gpus N] [--gpu_gib GIB] "
    parser = build_run_parser("plan", about, _EPILOG, usage)
    parser.add_argument("--gpus", type=int_at_least(1), help="default: num_processes, the visible ones, or 8")
    parser.add_argument("--gpu_gib", type=positive_float, help="memory of one, GiB; default: theirs, or else 80")
    args, flags = parser.parse_known_args(argv)

    from ..config.console import PlainConsole
    from ..launch.placement import plan  # torch from here on

    console = PlainConsole()
    for part in plan(args.config, flags, args.gpus, args.gpu_gib):
        console.print(part)
    return 0
