"""`tsdkd serve`."""

from collections.abc import Sequence

from .arguments import build_run_parser, int_at_least

_EPILOG = """The trainer keeps only the teacher's output layer and asks the server for hidden states. So every loss
is computed over the whole vocabulary (docs/cluster.md).
example:
  tsdkd serve teacher --config my.yaml --tensor_parallel_size 4
  tsdkd train --config my.yaml --teacher_placement server --teacher_server_base_url http://127.0.0.1:8001"""


def main(argv: Sequence[str]) -> int:
    """Serve a run's teacher with vLLM."""
    about = "Start a vLLM server for the teacher of a configuration, and say when it is ready."
    parser = build_run_parser(
        "serve teacher", about, _EPILOG, "[--host HOST] [--port PORT] [--tensor_parallel_size N] "
    )
    parser.add_argument("role", choices=["teacher"], help="the model to serve")
    parser.add_argument(
        "--host", metavar="HOST", help="address to listen at; default: that of teacher_server_base_url, else 127.0.0.1"
    )
    parser.add_argument(
        "--port",
        type=int_at_least(1),
        metavar="PORT",
        help="port to listen at; default: that of teacher_server_base_url, else 8001",
    )
    parser.add_argument(
        "--tensor_parallel_size",
        type=int_at_least(1),
        metavar="N",
        default=1,
        help="number of GPUs that share the teacher; default: %(default)s",
    )
    parser.add_argument("--dry_run", action="store_true", help="print vLLM's command, and exit")
    args, flags = parser.parse_known_args(argv)
    parser.refuse_misspelled(flags)

    from ..launch.teacher_server import serve_teacher  # torch from here on

    return serve_teacher(args.config, flags, args.host, args.port, args.tensor_parallel_size, args.dry_run)
