"""Programs that a model wrote, run where they can't do harm: no network, no files but their own, little of the rest.

Linux namespaces, resource limits and a seccomp filter, without root and without a container (`jail.py`). Not covered:
a hole in the kernel itself, and a program that sets out to fool its own tests, which run in its process.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TSDKDError

_JAIL_SCRIPT = Path(__file__).with_name("jail.py")
_MIB = 2**20


class SandboxError(TSDKDError, RuntimeError):
    """This machine doesn't let a program be locked in."""


@dataclass(frozen=True)
class ResourceLimits:
    """The resources that a program may use.

    Attributes:
        timeout_seconds: of wall time; also of each process's CPU time.
        memory_mib: of each process.
        disk_mib: of its directory, which is in memory.
        file_mib: of one file.
        max_processes: at once, threads included.
    """

    timeout_seconds: int = 10
    memory_mib: int = 512
    disk_mib: int = 32
    file_mib: int = 4
    max_processes: int = 16


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
    """Run a Python program to its end.

    Raises:
        SandboxError: the machine doesn't allow it to be locked in; the program wasn't run.
    """
    end_marker = secrets.token_hex(16)
    program += f'\n\nimport os as _os\n_os.write(3, b"{end_marker}")\n'  # an early exit(0) isn't success
    with (
        tempfile.TemporaryDirectory() as root,
        tempfile.TemporaryFile() as stdout_file,
        tempfile.TemporaryFile() as stderr_file,
    ):
        command = [sys.executable, "-I", "-S", str(_JAIL_SCRIPT)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout_file, stderr=stderr_file, env={}, cwd="/"
        )
        try:
            process.communicate(
                json.dumps(_build_jail_spec(program, root, limits)).encode(), timeout=limits.timeout_seconds
            )
            stop_reason = ""
        except subprocess.TimeoutExpired:
            process.kill()  # and with it all that it has started
            process.wait()
            stop_reason = f"stopped after {limits.timeout_seconds} s"
        stdout_file.seek(0)
        locked_in, _, end = stdout_file.read(100).decode(errors="replace").partition("\n")
        stderr_file.seek(max(0, stderr_file.seek(0, os.SEEK_END) - 4096))
        lines = stderr_file.read().decode(errors="replace").strip().splitlines()
    last_line = lines[-1] if lines else f"exit code {process.returncode}"
    if locked_in != "locked in" and not stop_reason:
        raise SandboxError(f"programs can't be locked in on this machine: {last_line}")
    passed = end == end_marker and process.returncode == 0 and not stop_reason
    return ProgramResult(passed, "" if passed else stop_reason or last_line[:200])


def _build_jail_spec(program: str, root: str, limits: ResourceLimits) -> dict[str, Any]:
    return {
        "program": program,
        "root": root,
        "python": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
        "interpreter": os.path.realpath(sys.base_prefix),
        "disk": limits.disk_mib * _MIB,
        "limits": {
            "CPU": limits.timeout_seconds,
            "AS": limits.memory_mib * _MIB,
            "FSIZE": limits.file_mib * _MIB,
            "NPROC": limits.max_processes,
            "NOFILE": 64,
            "CORE": 0,
        },
    }
