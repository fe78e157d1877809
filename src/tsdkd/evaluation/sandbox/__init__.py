"""Programs that a model wrote, run where they can't do harm: no network, no files but their own, little of the rest.

Linux namespaces, resource limits and a list of allowed system calls, without root and without a container (`jail.py`,
`seccomp.py`). Not covered: a hole in the kernel itself, and a program that sets out to fool its own tests, which run
in its process.
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
"""Seconds after each try that a signal, or a machine with no process, memory or descriptor left, has ended."""
_MOST_KILLS = 3
"""Times in a row that a program's init may be killed before that is taken for the program's doing, by its memory."""


class SandboxError(TSDKDError, RuntimeError):
    """This machine doesn't let a program be locked in."""


@dataclass(frozen=True)
class ResourceLimits:
    """The resources that a program may use.

    Attributes:
        timeout_seconds: of wall time; also of each process's CPU time.
        memory_mib: of each process.
        disk_mib: of its directory, which is in memory.
        file_mib: of one file, the program included.
        max_processes: at once, threads included.

    Raises:
        ValueError: one of them is below 1.
    """

    timeout_seconds: int = 10
    memory_mib: int = 512
    disk_mib: int = 32
    file_mib: int = 4
    max_processes: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")


@dataclass(frozen=True)
class ProgramResult:
    """The outcome of a program.

    Attributes:
        passed: it ran through to its last line.
        reason: where it didn't: the last line of its error output, or what stopped it.
    """

    passed: bool
    reason: str = ""


def run_program(program: str, limits: ResourceLimits = ResourceLimits()) -> ProgramResult:
    """Run a Python program to its end. When this returns, or raises, nothing that it has started is left.

    Raises:
        SandboxError: the machine doesn't allow it to be locked in, or in half a minute had no process or memory left
            for it or stopped each try; there is no verdict on the program.
    """
    end_marker = secrets.token_hex(16)
    # An early exit(0) isn't success. The name is another in processes that multiprocessing spawns.
    program += f'\n\nif __name__ == "__main__": import os as _os; _os.write(3, b"{end_marker}")\n'
    size, most = len(program.encode("utf-8", "surrogatepass")), min(limits.file_mib, limits.disk_mib)
    if size > most * _MIB:
        return ProgramResult(False, f"the program has {size / _MIB:.1f} MiB, at most {most} MiB fit")
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
            "NPROC": limits.max_processes + (os.geteuid() != 0),  # init counts where it is the same user
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
        raise SandboxError(f"programs can't be locked in on this machine: {error}") from error


def _run_jail(spec: dict[str, Any]) -> dict[str, Any]:
    """A program that couldn't be run to its end hasn't failed: wait for a busy machine."""
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
        raise SandboxError(f"programs can't be locked in on this machine: {result['error']}")
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
