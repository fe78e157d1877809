"""Runs programs that a model wrote in a sandbox: without network, with their own files only, with few resources.

It uses Linux namespaces, resource limits and a list of allowed system calls, and needs neither root nor a container
(`jail.py`, `seccomp.py`). It doesn't protect against vulnerabilities of the kernel, or against a program that
manipulates its own tests, which run in the same process.
"""

import errno
import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TSDKDError
from .seccomp import build_filter

_JAIL_SCRIPT = Path(__file__).with_name("jail.py")
_MIB = 2**20
_SYSTEM_PATHS = (
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
)
_BUSY = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_PAUSES = (1, 2, 4, 8, 16)
"""Seconds to wait after a try that failed because of a signal, or because the machine had no resources left."""
_MOST_KILLS = 3
"""If init is killed so many times in a row, the program is held responsible, because of its use of memory."""


class SandboxError(TSDKDError, RuntimeError):
    """The sandbox doesn't work on this machine."""


@dataclass(frozen=True)
class ResourceLimits:
    """The resources that a program may use.

    Attributes:
        timeout_seconds: wall time, and CPU time of each process, seconds.
        memory_mib: memory of each process, MiB.
        disk_mib: size of the working directory, which is in memory, MiB.
        file_mib: size of one file, including the program, MiB.
        max_processes: processes and threads at the same time.

    Raises:
        ValueError: a limit is below 1.
    """

    timeout_seconds: int = 10
    memory_mib: int = 512
    disk_mib: int = 32
    file_mib: int = 4
    max_processes: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, found {value}")


@dataclass(frozen=True)
class ProgramResult:
    """The outcome of a program.

    Attributes:
        passed: whether it ran to its last line.
        reason: if not, the last line of its error output, or what stopped it.
    """

    passed: bool
    reason: str = ""


def run_program(program: str, limits: ResourceLimits = ResourceLimits()) -> ProgramResult:
    """Run a Python program. When this function returns or raises, no process of the program is left.

    Raises:
        SandboxError: there is no verdict on the program, because the sandbox doesn't work on this machine, or because
            for half a minute the machine had no process or memory left, or stopped each try.
    """
    end_marker = secrets.token_hex(16)
    # An early exit(0) isn't success. In processes that multiprocessing spawns, __name__ has another value.
    program += f'\n\nif __name__ == "__main__": import os as _os; _os.write(3, b"{end_marker}")\n'
    size, most = len(program.encode("utf-8", "surrogatepass")), min(limits.file_mib, limits.disk_mib)
    if size > most * _MIB:
        return ProgramResult(False, f"the program has {size / _MIB:.1f} MiB, at most {most} MiB are allowed")
    result = _run_jail(_build_jail_spec(program, limits))
    if "error" in result:
        return ProgramResult(False, f"killed by the system, {_MOST_KILLS} times in a row")
    if result["timed_out"]:
        return ProgramResult(False, f"stopped after {limits.timeout_seconds} s")
    if result["end"] == end_marker and result["exit_code"] == 0:
        return ProgramResult(True)
    lines = result["errors"].strip().splitlines()
    reason = lines[-1] if lines else f"it ended before its last line, with exit code {result['exit_code']}"
    return ProgramResult(False, "".join(char if char.isprintable() else "\ufffd" for char in reason[:200]))


def _build_jail_spec(program: str, limits: ResourceLimits) -> dict[str, Any]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    libraries = {
        f"{os.path.realpath(prefix)}/{name}"
        for prefix in (sys.base_prefix, sys.base_exec_prefix)
        for name in ("lib", "lib64")
    }
    return {
        "program": program,
        "seconds": limits.timeout_seconds,
        "grader": os.getpid(),
        "python": python,
        "paths": [*_SYSTEM_PATHS, python, *sorted(libraries)],
        "filter": _build_filter().hex(),
        "disk": limits.disk_mib * _MIB,
        "limits": {
            "CPU": limits.timeout_seconds,
            "AS": limits.memory_mib * _MIB,
            "FSIZE": limits.file_mib * _MIB,
            "NPROC": limits.max_processes + (os.geteuid() != 0),  # init counts too if it is the same user
            "NOFILE": 64,
            "STACK": 8 * _MIB,
            **dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"), 0),
            "SIGPENDING": 64,
        },
    }


def _build_filter() -> bytes:
    try:
        return build_filter()
    except NotImplementedError as error:
        raise SandboxError(f"the sandbox can't be set up on this machine: {error}") from error


def _run_jail(spec: dict[str, Any]) -> dict[str, Any]:
    """Try again while the machine is busy: a program that couldn't run to its end hasn't failed."""
    kills = 0
    for pause in _PAUSES:
        result = _try_jail(spec)
        kills = kills + 1 if result.get("killed") else 0
        if kills == _MOST_KILLS:
            return result
        if result.get("errno") not in _BUSY:
            break
        time.sleep(pause)
    if "error" in result:
        raise SandboxError(f"the sandbox can't be set up on this machine: {result['error']}")
    return result


def _try_jail(spec: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", str(_JAIL_SCRIPT)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", start_new_session=True
        )
    except OSError as error:
        return {"error": str(error), "errno": error.errno}
    with process:
        try:
            output, errors = process.communicate(json.dumps(spec).encode())
        except BaseException:  # Ctrl-C
            process.terminate()
            process.wait()
            raise
    if output:
        result: dict[str, Any] = json.loads(output)
        return result
    lines = errors.decode(errors="replace").strip().splitlines()
    if lines:
        return {"error": lines[-1], "errno": None}
    return {"error": f"the supervisor was killed (exit code {process.returncode})", "errno": errno.EAGAIN}
