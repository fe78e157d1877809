"""`tsdkd train`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config.launch import launch_config_names
from ..config.logs import get_logger
from ..errors import ConfigError, TSDKDError, escape_line
from ..launch import accelerate as launch
from ..launch.processes import LaunchSpec, configured_num_processes, resolve_launch
from ..run.config_file import read_flags, read_raw_values
from .arguments import LAUNCHER_COMMAND, build_run_parser, int_at_least, say_how_to_continue

if TYPE_CHECKING:
    from ..run.arguments import RunArguments

logger = get_logger(__name__)

_EPILOG = """Every option of the method, of TRL's ModelConfig and of transformers' TrainingArguments is a key
of FILE and a flag: --learning_rate 1e-6, --gate false, --report_to tensorboard wandb.
`tsdkd train --help_keys` lists the options that tsdkd adds, with their defaults."""
_LAUNCH_FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "accelerate_config": (
        "FILE",
        str,
        f"a file, or one of {', '.join(launch_config_names())}; also a key of FILE",
    ),
    "num_processes": ("N", int_at_least(1), "default: one per visible GPU; also a key of FILE"),
    "num_machines": ("N", int_at_least(1), ""),
    "machine_rank": ("N", int_at_least(0), ""),
    "main_process_ip": ("HOST", str, ""),
    "main_process_port": ("PORT", int_at_least(0), ""),
    "rdzv_backend": ("NAME", str, ""),
}
_LAUNCH_CONFIG_KEYS = ("accelerate_config", "num_processes")


def main(argv: Sequence[str]) -> int:
    """Start the processes that the run needs, or hand over to `tsdkd.run.train`."""
    args, flags = _parser().parse_known_args(argv)
    if args.help_keys:
        from .keys import print_keys

        print_keys(read_flags(flags, []).get("method"))
        return 0
    launch.warn_about_compile_locks()
    if args.teacher_gpus is None or args.dry_run:
        return _train(argv, args, flags)
    from ..launch.teacher_server import running_teacher_server  # torch from here on

    with running_teacher_server(args.config, flags, args.teacher_gpus) as server_flags:
        return _train(argv, args, [*flags, *server_flags])


def _train(argv: Sequence[str], args: argparse.Namespace, flags: list[str]) -> int:
    launch_flags = {name: value for name in _LAUNCH_FLAGS if (value := getattr(args, name)) is not None}
    for name in (n for n in _LAUNCH_CONFIG_KEYS if n in launch_flags):
        flags.append(f"--{name}={launch_flags[name]}")
    raw_values = read_raw_values(args.config, flags)
    launch_spec = resolve_launch(raw_values, launch_flags, do_train=not args.dry_run) if raw_values else None

    from ..launch.requirements import missing_extras
    from ..run.announce import suggest_next
    from ..run.arguments import parse_arguments  # torch from here on
    from ..run.train import train

    missing = missing_extras(args.config, flags, raw_values, launch_spec)
    if args.dry_run:
        try:
            _print_dry_run(parse_arguments(args.config, flags, do_train=False), launch_spec)
        except TSDKDError as error:
            raise ConfigError([*missing, *error.lines]) if missing else error from None
    if missing and not launch_spec:
        try:
            parse_arguments(args.config, flags)
        except TSDKDError as error:
            raise ConfigError([*missing, *error.lines]) from None
    if missing:
        raise ConfigError(missing)
    if args.dry_run:
        return 0
    if launch_spec:
        if not launch_flags:
            text = f"tsdkd: starting {launch_spec.num_processes} processes, by {launch_spec.config}"
            print(escape_line(text), file=sys.stderr, flush=True)
        config_flags = [f"--config={args.config}"] if args.config is not None else []
        os.environ[LAUNCHER_COMMAND] = json.dumps(["train", *argv])
        try:
            return launch.launch_processes(launch_spec.config, launch_spec.options, ["train", *config_flags, *flags])
        finally:
            del os.environ[LAUNCHER_COMMAND]
    arguments = parse_arguments(args.config, flags)
    from_checkpoint = bool(arguments.explicit_values.get("resume_from_checkpoint"))
    with say_how_to_continue("train", *argv, from_checkpoint=from_checkpoint):
        train(arguments)
    for command in suggest_next(arguments):
        logger.info(f"next: {command}")
    return 0


def _print_dry_run(arguments: "RunArguments", launch_spec: LaunchSpec | None) -> None:
    from ..config.console import PlainConsole
    from ..run.dry_run import describe_run

    if launch_spec:
        processes: int | None = launch_spec.num_processes
    else:
        config, on_cpu = arguments.launch_args.accelerate_config, arguments.training_args.use_cpu
        processes = configured_num_processes(config, on_cpu)
    console = PlainConsole()
    for part in describe_run(arguments, processes):
        console.print(part)


def _parser() -> argparse.ArgumentParser:
    about = "Distill a teacher into a student. Starts one process per visible GPU."
    usage = "[--dry_run] [--accelerate_config NAME --num_processes N] "
    parser = build_run_parser("train", about, _EPILOG, usage)
    parser.add_argument("--dry_run", action="store_true", help="print the configuration and a summary, and exit")
    parser.add_argument(
        "--teacher_gpus",
        type=int_at_least(1),
        metavar="N",
        help="run the teacher on a vLLM server on the last N visible GPUs, which ends with the run (`tsdkd serve`)",
    )
    parser.add_argument("--help_keys", action="store_true", help="list tsdkd's own keys, and stop")
    group = parser.add_argument_group("several processes, started by accelerate")
    for name, (metavar, kind, text) in _LAUNCH_FLAGS.items():
        group.add_argument(f"--{name}", metavar=metavar, type=kind, help=text or "as in `accelerate launch`")
    return parser
