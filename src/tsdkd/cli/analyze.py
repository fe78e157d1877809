"""`tsdkd analyze`."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, install_hint
from .arguments import always_on_policy, build_run_parser, int_at_least

_EPILOG = """examples:
  tsdkd analyze runs/tsdkd runs/gkd --output_dir figures          runs with records (--record_steps N)
  tsdkd analyze --config demo.yaml --model_name_or_path runs/demo --output_dir runs/look     any two models
  tsdkd analyze --config demo.yaml --token_roles demo --output_dir runs/roles   what each loss term acts on
With --config, the student first completes some of the prompts, and what both models predict at each token is recorded
in output_dir. The figures are then written to output_dir/figures, and the token-role table to
output_dir/token_roles.json."""
_USAGE = """tsdkd analyze RUN_DIR ... [--output_dir DIR]
       tsdkd analyze --config FILE [--output_dir DIR] [--limit N] [--token_roles MODULE:FUNCTION]
                     [--key value ...]"""
_RENAMED = {"figures_dir": "output_dir", "num_prompts": "limit"}
_DEFAULT_LIMIT = 50
_SHIPPED_ROLES = {"demo": "tsdkd.demo.token_roles:assign_roles"}


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and hand over to `tsdkd.analysis`."""
    about = "Plot the papers' figures, and write the numbers behind them, from recorded runs or from any two models."
    parser = build_run_parser("analyze", about, _EPILOG, "", _RENAMED)
    parser.usage = _USAGE
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="folder for the figures; default: figures/ in the first run's folder. With --config: folder for the "
        "records, which must be new; default: the configuration's",
    )
    parser.add_argument(
        "--limit",
        type=int_at_least(1),
        metavar="N",
        help=f"with --config: use only the first N prompts; default: {_DEFAULT_LIMIT}",
    )
    parser.add_argument(
        "--token_roles",
        metavar="MODULE:FUNCTION",
        help="with --config: print, for each role of a token, what the loss terms act on, and how often another token "
        "changes whether the answer is right. Your function (decoded tokens of a completion, prompt) -> a role for "
        "each token, or demo",
    )
    args, rest = parser.parse_known_args(argv)
    if not args.config and not rest:
        raise ConfigError(["name folders of runs, or a configuration with --config"])
    parser.refuse_misspelled(rest)
    options = [text for text in rest if text.startswith("-")] + ["--limit"] * bool(args.limit)
    options += ["--token_roles"] * (args.token_roles is not None)
    if not args.config and options:
        raise ConfigError([f"{options[0]}: only with --config"])
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError([f"analyze needs matplotlib; {install_hint('report')}"]) from error

    if args.config:
        flags = rest if args.output_dir is None else [*rest, f"--output_dir={args.output_dir}"]
        _analyze_pair(args.config, flags, args.limit or _DEFAULT_LIMIT, args.token_roles)
    else:
        from ..analysis.write_figures import write_figures

        folders = [Path(text) for text in rest]
        write_figures(folders, args.output_dir or folders[0] / "figures")
    return 0


def _analyze_pair(config: str, flags: Sequence[str], limit: int, token_roles: str | None) -> None:
    """Record two models, and write the figures and the token-role table. Writes nothing if the user's code fails."""
    from ..analysis.record_pair import record_pair
    from ..analysis.token_roles import compute_token_roles, write_token_roles
    from ..analysis.write_figures import write_figures
    from ..config.user_code import load_function, load_grader
    from ..run.arguments import parse_arguments

    arguments = parse_arguments(config, always_on_policy(config, flags))
    if token_roles is not None:
        path = _SHIPPED_ROLES.get(token_roles, token_roles)
        function = load_function(path, "--token_roles", "the tokens", "the prompt")
        grader = load_grader(arguments.training_args.grader)
    record = record_pair(arguments, limit)
    table = None if token_roles is None else compute_token_roles(record, function, path, grader)
    folder = record.write()
    write_figures([folder], folder / "figures")
    if table is not None:
        write_token_roles(table, folder)
