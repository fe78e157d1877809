"""`tsdkd train`."""

from collections.abc import Callable, Sequence
from typing import Any

from .. import launch
from .arguments import at_least, run_parser

_EPILOG = """Every field of the method's configuration, of TRL's ModelConfig and of transformers' TrainingArguments is
a key of FILE and a flag: --learning_rate 1e-6, --gate false, --report_to tensorboard wandb.
`tsdkd train --help_keys` lists tsdkd's own keys with their defaults."""
_LAUNCH: dict[str, tuple[str, Callable[[str], Any]]] = {
    "num_processes": ("N", at_least(1)),
    "num_machines": ("N", at_least(1)),
    "machine_rank": ("N", at_least(0)),
    "main_process_ip": ("HOST", str),
    "main_process_port": ("PORT", at_least(0)),
    "rdzv_backend": ("NAME", str),
}


def main(argv: Sequence[str]) -> int:
    """Parse, and hand over to `tsdkd.run`."""
    about = "Distil a student from a teacher."
    usage = "[--dry_run] [--accelerate_config NAME --num_processes N] "
    parser = run_parser("train", about, _EPILOG, usage)
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print configuration and plan, and stop")
    parser.add_argument("--help_keys", action="store_true", help="list tsdkd's own keys, and stop")
    group = parser.add_argument_group("several processes, by accelerate")
    group.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help=f"a launch configuration, or one of {', '.join(launch.config_names())}",
    )
    for name, (metavar, kind) in _LAUNCH.items():
        group.add_argument(f"--{name}", metavar=metavar, type=kind, help="as in `accelerate launch`")
    args, flags = parser.parse_known_args(argv)
    options = {name: value for name in _LAUNCH if (value := getattr(args, name)) is not None}
    if (args.accelerate_config or options) and not args.help_keys and not args.dry_run:
        own = ["--config", args.config] if args.config else []
        return launch.launch(args.accelerate_config, options, ["train", *own, *flags])

    launch.tell_locks()
    from .. import run  # torch from here on

    if args.help_keys:
        run.print_keys()
        return 0
    arguments = run.parse(args.config, flags)
    if args.dry_run:
        run.plan(arguments)
    else:
        run.train(arguments)
    return 0
