"""`tsdkd generate`."""

from collections.abc import Sequence
from pathlib import Path

from .arguments import always_on_policy, build_run_parser, int_at_least

_EPILOG = """examples:
  tsdkd generate --config my.yaml --output_file teacher.jsonl
  tsdkd generate --config my.yaml --output_file student.jsonl --role student --num_completions 4 --use_vllm true
  tsdkd train --config my.yaml --dataset_name teacher.jsonl --lmbda 0
FILE is a run's configuration: its pair, prompts, limits, temperature and seed are taken. A file that has some of the
rows already gets the others."""


def main(argv: Sequence[str]) -> int:
    """Parse, and hand over to `tsdkd.generate`."""
    about = "Write completions of the teacher (or the student) for a run's prompts to a JSONL file."
    usage = "--output_file FILE [--role ROLE] [--num_completions N] "
    parser = build_run_parser("generate", about, _EPILOG, usage)
    parser.add_argument("--output_file", metavar="FILE", type=Path, required=True)
    parser.add_argument("--role", choices=["teacher", "student"], default="teacher", help="default: %(default)s")
    parser.add_argument(
        "--num_completions", metavar="N", type=int_at_least(1), default=1, help="for each prompt; default: 1"
    )
    parser.add_argument("--top_p", metavar="MASS", type=float, help="nucleus mass; default: the run's")
    args, flags = parser.parse_known_args(argv)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top_p: must be in (0, 1], found {args.top_p}")

    from ..generate import generate_completions
    from ..run.arguments import parse_arguments  # torch from here on

    flags.append(f"--output_dir={args.output_file.parent}")  # nothing is written there
    arguments = parse_arguments(args.config, always_on_policy(args.config, flags))
    generate_completions(arguments, args.role, args.output_file, args.num_completions, args.top_p)
    return 0
