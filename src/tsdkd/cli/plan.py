"""`tsdkd plan`."""

from collections.abc import Sequence

from .arguments import at_least, positive, run_parser

_EPILOG = """The estimate is for full-length completions. It needs the models' configurations, no weights and no GPU.
example:
  tsdkd plan --config qwen25_14b_to_1p5b.yaml --gpus 8 --gpu_gib 80"""


def main(argv: Sequence[str]) -> int:
    """Print what a configuration takes."""
    about = "What a configuration takes on each GPU, and which placement fits."
    usage = "[--gpus N] [--gpu_gib GIB] "
    parser = run_parser("plan", about, _EPILOG, usage)
    parser.add_argument("--gpus", type=at_least(1), help="default: those that are visible, or else 8")
    parser.add_argument("--gpu_gib", type=positive, help="memory of one, GiB; default: theirs, or else 80")
    args, flags = parser.parse_known_args(argv)

    from ..placement import show_plan
    from ..processes import visible_gpus

    here = visible_gpus()
    gpus = args.gpus or here or 8
    gpu_gib = args.gpu_gib or (smallest_gib(here) if here else 80.0)
    if args.gpus is None or args.gpu_gib is None:
        print(f"for {gpus} x {gpu_gib:.0f} GiB, {'as here' if here else 'as there is no GPU here'}")
    show_plan(args.config, flags, gpus, gpu_gib)
    return 0


def smallest_gib(gpus: int) -> float:
    """Memory of the smallest visible GPU, GiB."""
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus)) / 2**30
