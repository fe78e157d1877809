"""`tsdkd`, `python -m tsdkd`, and `accelerate launch -m tsdkd`."""

import atexit
import os
import sys

from .cli import main
from .cli.logs import hide_progress_bars
from .cli.output import never_failing_output
from .launch.children import report_failure


def run() -> int:
    """`main` as a program. One of several processes ends without tearing Python down: a thread of torch.distributed's
    that lets go of its last tensor during that would abort it, and the launcher then kills the others as they save.
    Where vLLM rolls out, a process ends as usual: destructors of its engine remove shared memory."""
    code: object = 1

    def leave() -> None:
        if "tsdkd.rollout.vllm.colocate" in sys.modules:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(leave)  # the first to be registered is the last to run: trackers have ended by then
    try:
        with never_failing_output():
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are for developers
            _shorten_openmp_spinning()
            if not sys.stderr.isatty() or sys.argv[1:2] == ["demo"]:  # a log file, or models that are small
                hide_progress_bars()
            code = main()
    except SystemExit as end:
        code = end.code or 0
        raise
    finally:
        report_failure(code)
    return code


def _shorten_openmp_spinning() -> None:
    """Let a thread that waits for another give up its core soon. Call this before anything imports torch.

    By default, GNU OpenMP spins for 300,000 rounds, which is milliseconds. If other processes use the same cores, the
    thread it waits for cannot run meanwhile, and each small operation may take as long. 1,000 rounds still cover the
    gap between two operations, so that an idle machine loses nothing.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


if __name__ == "__main__":
    sys.exit(run())
