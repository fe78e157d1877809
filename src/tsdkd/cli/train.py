"""`tsdkd train`."""

import argparse
from collections.abc import Sequence

_EPILOG = """Every field of the method's configuration, of TRL's ModelConfig and of transformers' TrainingArguments is
a key of FILE and a flag: --learning_rate 1e-6, --gate false, --report_to tensorboard wandb.
`tsdkd train --help_keys` lists tsdkd's own keys with their defaults."""


def main(argv: Sequence[str]) -> int:
    """Parse, and hand over to `tsdkd.run`."""
    parser = argparse.ArgumentParser(
        prog="tsdkd train",
        description="Distil a student from a teacher.",
        epilog=_EPILOG,
        usage="tsdkd train --config FILE [--key value ...] [--dry_run]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a shipped one (`tsdkd configs`)")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print configuration and plan, and stop")
    parser.add_argument("--help_keys", action="store_true", help="list tsdkd's own keys, and stop")
    args, flags = parser.parse_known_args(argv)

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
