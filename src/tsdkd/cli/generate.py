"""`tsdkd generate`."""

from collections.abc import Sequence
from pathlib import Path

from .arguments import always_on_policy, build_run_parser, int_at_least

_EPILOG = """examples:
  tsdkd generate --config my.yaml --output_file teacher.jsonl
  tsdkd generate --config my.yaml --output_file student.jsonl --role student --samples 4 --use_vllm true
  tsdkd generate --config my.yaml --output_file try.jsonl --limit 10
  tsdkd train --config my.yaml --dataset_name teacher.jsonl --lmbda 0
The models, prompts, length limits, temperature and seed come from the run's configuration. If the output file already
has some of the rows, only the missing ones are generated."""
_RENAMED = {"num_completions": "samples"}


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and hand over to `tsdkd.generate`."""
    about = "Write the teacher's (or the student's) completions of a run's prompts to a JSONL file."
    usage = "--output_file FILE [--role ROLE] [--samples N] [--limit N] "
    parser = build_run_parser("generate", about, _EPILOG, usage, _RENAMED)
    parser.add_argument("--output_file", metavar="FILE", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument(
        "--role", choices=["teacher", "student"], default="teacher", help="the model that generates; default: teacher"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int_at_least(1), default=1, help="completions per prompt; default: 1"
    )
    parser.add_argument("--limit", metavar="N", type=int_at_least(1), help="use only the first N prompts")
    parser.add_argument("--top_p", metavar="P", type=float, help="nucleus sampling; default: the configuration's")
    args, flags = parser.parse_known_args(argv)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top_p: must be in (0, 1], found {args.top_p}")
    parser.refuse_misspelled(flags)

    from ..generate import generate_completions
    from ..run.arguments import parse_arguments  # torch from here on

    flags.append(f"--output_dir={args.output_file.parent}")  # a required key; generate writes nothing there
    arguments = parse_arguments(args.config, always_on_policy(args.config, flags))
    generate_completions(arguments, args.role, args.output_file, args.samples, args.limit, args.top_p)
    return 0
