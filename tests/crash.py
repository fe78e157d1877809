"""Runs of `tsdkd` in child processes that are killed or signalled at chosen places.

Children are forked from a server that has imported everything and run nothing, so a run costs about a second.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from preloaded import MODULES

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*MODULES, "crash"])
# what Python reports of a file that is opened for writing, renamed or removed, before it happens
_EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def _child(argv: list[str], environment: dict[str, str], folder: str, kill_at: int | None, counts: Any) -> None:
    os.environ.update(environment)
    output = os.open(os.environ["CRASH_OUTPUT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen = 0

    def boundary() -> None:
        nonlocal seen
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _EVENTS:
            path = arguments[0]
            # what rmtree removes is relative to an open folder
            if isinstance(path, (str, os.PathLike)) and (str(path).startswith(folder) or not os.path.isabs(path)):
                boundary()

    import safetensors.torch as written_in_rust  # no event for it
    import torch

    from tsdkd.cli import main
    from tsdkd.cli.output import never_failing_output

    torch.set_num_threads(1)
    inner = written_in_rust.serialize_file

    def serialize_file(*args: Any, **kwargs: Any) -> Any:
        boundary()
        return inner(*args, **kwargs)

    written_in_rust.serialize_file = serialize_file
    if "CRASH_ANY_WEIGHTS" in os.environ:
        accept_any_weights()
    sys.addaudithook(hook)
    with never_failing_output():
        code = main(argv)
    if counts is not None:
        counts.put(seen)
    sys.exit(code)


def accept_any_weights() -> None:
    """Have this process load weights that aren't finite, as those of a run become that diverges."""
    import tsdkd.models.loading

    tsdkd.models.loading.require_finite = lambda *_: None


class Run:
    """`tsdkd argv` in a child; `output` is what it printed."""

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        kill_at: int | None = None,
        environment: dict[str, str] | None = None,
        counts: Any = None,
    ) -> None:
        self.log = folder.parent / f"{folder.name}.log"
        environment = {"CRASH_OUTPUT": str(self.log), **(environment or {})}
        arguments = (argv, environment, str(folder), kill_at, counts)
        self.process = _CONTEXT.Process(target=_child, args=arguments)
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hung after {seconds} s: {self.output[-2000:]}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run(argv: list[str], folder: Path, **kwargs: Any) -> tuple[int, str]:
    """Exit code and output of `tsdkd argv`, which writes into `folder`."""
    child = Run(argv, folder, **kwargs)
    return child.wait(), child.output


def count_boundaries(argv: list[str], folder: Path) -> int:
    """How many file operations a run does in its folder."""
    counts = _CONTEXT.Queue()
    child = Run(argv, folder, counts=counts)
    found = counts.get(timeout=300)
    assert child.wait() == 0, child.output[-2000:]
    return found


def run_ranks(argv: list[str], folder: Path, processes: int = 2, **environment: str) -> list[Run]:
    """`tsdkd argv` in processes that form a group, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return [
        Run(argv, folder, environment={**common, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def wait_for(path: Path, seconds: float = 120) -> None:
    """Until something exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)
