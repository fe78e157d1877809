"""Programs of a model: the good ones pass, hostile ones neither escape nor hang, and nothing of them is left."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tsdkd.evaluation.sandbox import ResourceLimits, run_program

LIMITS = ResourceLimits(timeout_seconds=3)
MARK = f"tsdkd-hostile-{os.getpid()}"

# Each says "ESCAPED" by running through to its end; a program that is stopped, or that gets an exception, hasn't.
HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that ignores errors": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """,
    "threads without end": """
        import threading, time
        while True: threading.Thread(target=time.sleep, args=(99,)).start()
    """,
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(1000)",
    "sleeps, deaf to signals": """
        import signal, time
        for n in range(1, 32):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        time.sleep(1000)
    """,
    "endless output": "while True: print('x' * 10**6, flush=True)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "endless verdict": "import os\nwhile True: os.write(3, b'x' * 10**6)",
    "all memory": "x = bytearray(10**11)",
    "all memory, slowly": "x = []\nwhile True: x.append(bytearray(10**7))",
    "all memory, in children": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
            try: x = bytearray(4 * 10**8)
            except MemoryError: pass
    """,
    "a huge integer": "x = 10 ** 10**10",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a huge file": "open('big', 'wb').write(bytes(10**8))",
    "many files": "for i in range(10**6): open(str(i), 'w').write('x')",
    "a full disk": "for i in range(1000): open(str(i), 'wb').write(bytes(4 * 10**6))",
    "many open files": "files = [open('/dev/null') for _ in range(10**5)]",
    "memory in a file descriptor": "import os; os.memfd_create('x')",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 2**30, 0o1600) >= 0",
    "early exit": "raise SystemExit(0)",
    "early hard exit": "import os; os._exit(0)",
    "exit at once, and a child that goes on": """
        import os, time
        if os.fork(): os._exit(0)
        os.setsid()
        time.sleep(1000)
    """,
    "reads the home directory": """
        import os, sys
        names = os.listdir({home!r})  # of the interpreter's path, if it lies there, and of nothing else
        assert [name for name in names if not sys.base_prefix.startswith(os.path.join({home!r}, name))]
    """,
    "reads a file of the user": "open({secret!r}).read()",
    "reads it by a symlink": "import os; os.symlink({secret!r}, 'link'); open('link').read()",
    "reads it by a hard link": "import os; os.link({secret!r}, 'link')",
    "reads it from the old root": "import os\nfor _ in range(99): os.chdir('..')\nopen('.' + {secret!r}).read()",
    "reads the passwords": "open('/etc/passwd').read()",
    "reads a secret of the environment": "import os; os.environ['TSDKD_TEST_SECRET']",
    "reads the parent's environment": "open('/proc/1/environ').read()",
    "reads the parent's memory": "import os; open(f'/proc/{{os.getppid()}}/mem')",
    "writes into the interpreter": "import os, json; open(os.path.join(os.path.dirname(json.__file__), 'x.py'), 'w')",
    "writes into /usr": "open('/usr/bin/x', 'w')",
    "makes a device": "import os, stat; os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "kills the parent": "import os, signal; os.kill({parent}, signal.SIGKILL)",
    "kills its own parent": "import os, signal; assert os.getppid() > 0; os.kill(os.getppid(), signal.SIGKILL)",
    "kills everyone": "import os, signal; os.kill(-1, signal.SIGKILL); assert False",
    "connects to this machine": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "connects to the internet": "import socket; socket.create_connection(('1.1.1.1', 53), 2)",
    "asks for a name": "import socket; socket.getaddrinfo('example.org', 80)",
    "sends a datagram": """
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))
    """,
    "connects to an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{mark}')",
    "becomes root": "import os; os.setuid(0); assert os.getuid() == 0; os.chroot('/')",
    "new user namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "clones into a user namespace": """
        import ctypes
        assert ctypes.CDLL(None).syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0) >= 0
    """,
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None) == 0",
    "traces a process": "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "a bare surrogate": "x = '\\ud800'; x.encode()",
    "no program": "def f(:",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory):
    """What a program would like to reach: a file, an environment variable, sockets."""
    folder = Path.home() / f".{MARK}"
    folder.write_text("secret")
    os.environ["TSDKD_TEST_SECRET"] = "secret"
    server, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    local.bind(f"\0{MARK}")
    local.listen()
    yield {
        "home": str(Path.home()),
        "secret": str(folder),
        "parent": os.getpid(),
        "port": server.getsockname()[1],
        "mark": MARK,
        "clone": {"x86_64": 56, "aarch64": 220}[os.uname().machine],
    }
    folder.unlink()
    del os.environ["TSDKD_TEST_SECRET"]
    server.close()
    local.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name: str, outside: dict) -> None:
    before = _descendants()
    program = (
        textwrap.dedent(HOSTILE[name]).format(**outside) if "{" in HOSTILE[name] else textwrap.dedent(HOSTILE[name])
    )
    verdict = run_program(program, LIMITS)
    assert not verdict.passed, f"{name}: it ran through"
    assert len(verdict.reason) <= 200
    assert _descendants() <= before


def test_good_programs() -> None:
    assert run_program("def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5").passed
    assert run_program(
        "import re, math, heapq, collections, itertools, random, json\nrandom.seed(); print('ok')"
    ).passed
    assert run_program("open('mine', 'w').write('x'); assert open('mine').read() == 'x'").passed
    assert run_program("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").passed


def test_wrong_program_says_why() -> None:
    assert run_program("assert 1 == 2, 'not equal'").reason == "AssertionError: not equal"
    assert "stopped after 1 s" in run_program("while True: pass", ResourceLimits(timeout_seconds=1)).reason


def test_programs_do_not_see_each_other() -> None:
    assert run_program("import os; open('/work/left', 'w')").passed
    assert not run_program("open('/work/left')").passed


def test_many_at_once() -> None:
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append(run_program(f"assert {i} % 2 == 0").passed))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [False] * 4 + [True] * 4


def test_killed_grader_leaves_no_program() -> None:
    program = "import time; time.sleep(999)"
    code = f"from tsdkd.evaluation.sandbox import *; run_program({program!r}, ResourceLimits(timeout_seconds=900))"
    grader = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (programs := _programs_of(grader.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert programs
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in programs) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in programs if Path(f"/proc/{pid}").exists()]


def _descendants() -> set[int]:
    return set(_programs_of(os.getpid()))


def _programs_of(root: int) -> list[int]:
    """Its descendants that run a program of the sandbox."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, layer = [], {root}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found += layer
    return [pid for pid in found if b"/work/program.py" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
