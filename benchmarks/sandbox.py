"""Our sandbox and bubblewrap, with the same hostile programs: how many are held, and how long a program takes.

    python benchmarks/sandbox.py        # as root, and as a user

bubblewrap gets what it has options for, our filter of system calls, and our resource limits.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_sandbox import HOSTILE, LIMITS, PREFIX, SHORT, STUBBORN, _find_programs
from tsdkd.evaluation.sandbox import ResourceLimits, _build_jail_spec, run_program


def _run_bubblewrap(program: str, limits: ResourceLimits) -> bool:
    spec = _build_jail_spec(program, limits)
    with tempfile.TemporaryFile() as end, tempfile.TemporaryFile() as code, tempfile.TemporaryFile() as rules:
        code.write((program + "\n\nimport os\nos.write(3, b'end')").encode("utf-8", "surrogatepass"))
        rules.write(bytes.fromhex(spec["filter"]))
        for file in (code, rules):
            file.seek(0)

        def prepare() -> None:
            for name, value in spec["limits"].items():
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            os.dup2(end.fileno(), 3)

        command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
        command += [part for path in spec["paths"] if os.path.exists(path) for part in _bind(path)]
        command += [
            "--size",
            str(spec["disk"]),
            "--tmpfs",
            "/work",
            "--chdir",
            "/work",
            "--seccomp",
            str(rules.fileno()),
        ]
        command += ["--file", str(code.fileno()), "/work/program.py", spec["python"], "-I", "-B", "/work/program.py"]
        null, kept = subprocess.DEVNULL, (code.fileno(), rules.fileno(), 3)
        process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, pass_fds=kept, preexec_fn=prepare, env={}
        )  # fmt: skip
        try:
            process.wait(limits.timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end.seek(0)
        return end.read(9) == b"end" and process.returncode == 0


def _bind(path: str) -> list[str]:
    if os.path.islink(path):
        return ["--symlink", os.readlink(path), path]
    return ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]


def main() -> None:
    """Print a line for each sandbox, with the programs that it didn't hold."""
    outside = {
        "home": str(Path.home()),
        "secret": __file__,
        "parent": os.getpid(),
        "port": 9,
        "mark": "x",
        "clone": 56,
    }
    programs = {name: (text.format(**outside) if "{" in text else text, LIMITS) for name, text in HOSTILE.items()}
    programs |= {name: (PREFIX + textwrap.dedent(text), SHORT) for name, text in STUBBORN.items()}
    ours: Callable[[str, ResourceLimits], bool] = lambda program, limits: run_program(program, limits).passed  # noqa: E731
    for title, run in (("ours", ours), ("bubblewrap", _run_bubblewrap)):
        if not run("x = 1", LIMITS):
            print(f"{title}: doesn't run programs here")
            continue
        seconds = []
        for _ in range(20):
            start = time.monotonic()
            run("x = 1", LIMITS)
            seconds.append(time.monotonic() - start)
        failed = [name for name, (text, limits) in programs.items() if run(textwrap.dedent(text), limits)]
        time.sleep(1)
        left = len(_find_programs())
        held = f"{len(programs) - len(failed)} of {len(programs)} held, {left} processes left"
        print(f"{title}: {held}, {statistics.median(seconds):.3f} s a program; not held: {', '.join(failed)}")


if __name__ == "__main__":
    main()
