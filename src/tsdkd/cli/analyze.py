"""`tsdkd analyze`."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .arguments import always_on_policy, build_run_parser, int_at_least

_EPILOG = """examples:
  tsdkd analyze runs/tsdkd runs/gkd --figures_dir figures         runs that recorded (--record_steps N)
  tsdkd analyze --config demo.yaml --model_name_or_path runs/demo --output_dir runs/look     any two models
With --config, the student answers some of the run's prompts, and what both models say at each token is recorded in
output_dir first."""


def main(argv: Sequence[str]) -> int:
    """Parse, and hand over to `tsdkd.analysis`."""
    about = "The papers' figures, and the numbers in them, from recorded runs or any two models."
    parser = build_run_parser("analyze", about, _EPILOG, "RUN_DIR ... | ")
    parser.add_argument("--figures_dir", type=Path, help="default: figures/ in the first run's directory")
    parser.add_argument("--num_prompts", type=int_at_least(1), help="with --config; default: 50")
    args, rest = parser.parse_known_args(argv)
    if not args.config and not rest:
        raise ConfigError(["name directories of runs, or a configuration with --config"])
    options = [text for text in rest if text.startswith("-")] + ["--num_prompts"] * bool(args.num_prompts)
    if not args.config and options:
        raise ConfigError([f"{options[0]}: only with --config"])
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(["analyze needs matplotlib; pip install 'tsdkd[report]'"]) from error

    from ..analysis.record_pair import record_pair
    from ..analysis.write_figures import write_figures
    from ..run.arguments import parse_arguments

    if args.config:
        arguments = parse_arguments(args.config, always_on_policy(args.config, rest))
        folders = [record_pair(arguments, args.num_prompts or 50)]
    else:
        folders = [Path(text) for text in rest]
    write_figures(folders, args.figures_dir or folders[0] / "figures")
    return 0
