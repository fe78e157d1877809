"""A Python that has already imported what `tsdkd` needs: `[python(), "-m", "tsdkd", ...]` starts at once.

Importing takes 4 to 15 seconds of a core. A server imports once and forks for each start. The program `python()` sends
it the arguments, environment, folder and streams, passes signals on, and ends as the forked process does. That process
joins the program's group, unless the group is in another session. It differs from a fresh one in its parent, in what
it has imported, and in its hash seed; a test in which one of these matters, or a variable that is read by an import,
takes `sys.executable`.
"""

import atexit
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

MODULES = ["tsdkd.cli.train", "tsdkd.run.train", "trl.experimental.gkd"]
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
started = json.dumps([sys.argv, dict(os.environ), os.getcwd(), os.getpgrp()]).encode()
socket.send_fds(server, [len(started).to_bytes(8, "big")], [0, 1, 2])
server.sendall(started)

def receive():
    return int.from_bytes(server.recv(8) or sys.exit("the server of preloaded.py has ended"), "big", signed=True)

pid = receive()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = receive()
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def python() -> str:
    """The program."""
    return _start()[0] if hasattr(os, "pidfd_open") else sys.executable  # Linux has it


@functools.cache
def _start() -> tuple[str, subprocess.Popen]:
    """The program and its server, which ends with this process: its input does."""
    folder = Path(tempfile.mkdtemp(prefix="preloaded-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client, address = folder / "python", str(folder / "socket")
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    command = [sys.executable, __file__, address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    assert server.stdout.readline() == b"ready\n"
    return str(client), server


def serve(address: str) -> None:
    """Fork for each client, until the standard input ends."""
    gc.disable()
    for module in MODULES:
        import_module(module)
    if find_spec("vllm"):
        _preload_vllm()
    gc.freeze()  # or each process would copy all of it to look for garbage
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    selector.register(listener, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            elif key.fileobj is listener:
                _start_process(listener, selector)
            elif isinstance(key.fileobj, int):
                _end_process(key.fileobj, *key.data, selector)
            elif key.fileobj.fileno() >= 0:  # the client was killed
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def _preload_vllm() -> None:
    """A server is three processes. On a CPU vLLM starts the other two anew; here they are forks, as on a GPU."""
    for module in ("vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
        import_module(module)
    system = import_module("vllm.utils.system_utils")
    system.multiprocessing = types.SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))


def _start_process(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    client, _ = listener.accept()
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    try:
        argv, environment, folder, group = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    except ValueError:  # the client was killed
        client.close()
        return
    pid = os.fork()
    if pid == 0:
        selector.close()
        listener.close()
        client.close()
        with contextlib.suppress(OSError):  # of another session, or it has ended
            os.setpgid(0, group)
        _leave(_run(_become, argv, environment, folder, streams))
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):  # it was killed; reading from it will tell
        client.sendall(pid.to_bytes(8, "big"))
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
    selector.register(client, selectors.EVENT_READ, pid)


def _end_process(pidfd: int, pid: int, client: socket.socket, selector: selectors.BaseSelector) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    selector.unregister(pidfd)
    os.close(pidfd)
    with contextlib.suppress(KeyError):
        selector.unregister(client)
    with contextlib.suppress(OSError):
        client.sendall(code.to_bytes(8, "big", signed=True))
    client.close()


def _become(argv: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be the Python `argv`."""
    import numpy as np

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=True)
    random.seed()
    np.random.seed()
    os.chdir(folder)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in known]
    sys.path[:] = [folder, *added, *sys.path[1:]]
    for path in added:
        if Path(path, "sitecustomize.py").exists():
            runpy.run_path(str(Path(path, "sitecustomize.py")))
    sys.executable, *arguments = argv
    while arguments[0] in ("-u", "-W"):
        del arguments[: 1 if arguments[0] == "-u" else 2]
    kind, *rest = arguments
    if kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0], sys.path[0] = "-c", ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        module, *sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def _run(program: Callable[..., None], *arguments: Any) -> int:
    """The exit code of what may end by an exception, as Python reports it."""
    try:
        program(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End without tearing down all modules, which takes seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
