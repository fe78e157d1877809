"""Programs of a model: the good ones pass, hostile ones neither escape nor hang, and nothing of them is left."""

import ctypes
import fcntl
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tsdkd.evaluation import sandbox
from tsdkd.evaluation.sandbox import ResourceLimits, SandboxError, run_program, seccomp

MEMORY_MIB = 512 + os.getpid() % 199  # by which programs of this process are found
LIMITS = ResourceLimits(timeout_seconds=3, memory_mib=MEMORY_MIB)
SHORT = ResourceLimits(timeout_seconds=1, memory_mib=MEMORY_MIB)
MARK = f"tsdkd-hostile-{os.getpid()}"

# Each says "ESCAPED" by running through to its end; a program that is stopped, or that gets an exception, hasn't.
HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "more processes than it may have": """
        import os, time
        for _ in range(40):
            if os.fork() == 0: time.sleep(1000)
    """,
    "threads without end": """
        import threading, time
        while True: threading.Thread(target=time.sleep, args=(99,)).start()
    """,
    "endless output": "while True: print('x' * 10**6, flush=True)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "endless verdict": "import os\nwhile True: os.write(3, b'x' * 10**6)",
    "a verdict of its own": "import os; os.write(3, b'x')",
    "a verdict somewhere else": "import os; os.lseek(3, 1, 0)",
    "no descriptor for its verdict": "import os; os.close(3)",
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
    "writes beside its directory": "open('/x', 'w')",
    "writes beside the interpreter": "import os, sys; open(os.path.join(sys.base_prefix, 'x'), 'w')",
    "limits the init": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
    "takes back its niceness": "import os; os.nice(5); os.nice(-1)",
    "a large shared memory": "from multiprocessing.shared_memory import SharedMemory as M; M(create=True, size=10**8)",
    "watches a file of the machine": "import ctypes; assert ctypes.CDLL(None).inotify_init() >= 0",
    "large pipes": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 1031, 2**20)",
    "makes a device": "import os, stat; os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "kills the parent": "import os, signal; os.kill({parent}, signal.SIGKILL)",
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
    program = (
        textwrap.dedent(HOSTILE[name]).format(**outside) if "{" in HOSTILE[name] else textwrap.dedent(HOSTILE[name])
    )
    verdict = run_program(program, LIMITS)
    assert not verdict.passed, f"{name}: it ran through"
    assert len(verdict.reason) <= 200
    assert not _find_programs()


PREFIX = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)  # no signal when the parent dies
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
"""
# Each would go on for ever.
STUBBORN = {
    "sleeps": "time.sleep(1000)",
    "works": "while True: pass",
    "in a session of its own": "if os.fork() == 0: os.setsid()\ntime.sleep(1000)",
    "in children, each of the last": """
        while True:
            if os.fork(): time.sleep(0.01); os._exit(0)
    """,
    "in children that its main process leaves behind": "if os.fork(): os._exit(0)\nwhile True: pass",
    "in as many processes as it may have": """
        while True:
            try:
                if os.fork() == 0: libc.prctl(1, 0, 0, 0, 0)
            except OSError: time.sleep(0.01)
    """,
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stops everyone": "os.fork()\nos.kill(-1, signal.SIGSTOP)\ntime.sleep(1000)",
    "sends the init every signal": "for n in range(1, 65): os.kill(1, n)\ntime.sleep(1000)",
    "becomes another program": "os.execv('/bin/sleep', ['sleep', '1000'])",
    "waits for a child that doesn't end": "if os.fork() == 0: time.sleep(1000)\nos.wait()",
}
LEFT_BEHIND = {"in children, each of the last", "in children that its main process leaves behind"}  # over at once


@pytest.mark.parametrize("name", STUBBORN)
def test_nothing_outlives_its_time(name: str) -> None:
    verdict = run_program(PREFIX + textwrap.dedent(STUBBORN[name]), SHORT)
    assert not verdict.passed
    assert not _find_programs()


@pytest.mark.parametrize("name", STUBBORN.keys() - LEFT_BEHIND)
def test_nothing_outlives_a_killed_grader(name: str) -> None:
    program = PREFIX + textwrap.dedent(STUBBORN[name])
    limits = ResourceLimits(timeout_seconds=900, memory_mib=MEMORY_MIB)
    grader = _fork(lambda: run_program(program, limits))
    _wait_until(_find_programs)
    os.kill(grader, signal.SIGKILL)
    os.waitpid(grader, 0)
    _wait_until(lambda: not _find_programs())


def test_nothing_outlives_an_interrupted_grader() -> None:
    def grade() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            run_program("import time; time.sleep(1000)", ResourceLimits(timeout_seconds=900, memory_mib=MEMORY_MIB))
        assert not _find_programs()

    grader = _fork(grade)
    _wait_until(_find_programs)
    os.kill(grader, signal.SIGINT)
    assert os.waitpid(grader, 0)[1] == 0


# What they do to their descriptors is to no one's harm but theirs.
MEDDLESOME = {
    "cuts": "for n in range(64):\n    try: os.ftruncate(n, 0)\n    except OSError: pass",
    "writes somewhere": """
        for n in range(64):
            for offset in (0, 1, 10**6):
                try: os.pwrite(n, b'locked in', offset)
                except OSError: pass
    """,
    "stretches": "for n in range(64):\n    try: os.ftruncate(n, 4 * 10**6)\n    except OSError: pass",
    "closes": "os.closerange(0, 64)",
    "swaps": "a, b = os.dup(2), os.dup(3)\nos.dup2(a, 3)\nos.dup2(b, 2)\nos.write(2, b'x')",
    "doesn't wait": "for n in range(4): os.set_blocking(n, False)",
    "isn't text": "os.write(2, bytes(range(256)) * 99)\nos._exit(1)",
    "one long line": "os.write(2, b'x' * 10**6)\nos._exit(1)",
    "says what the sandbox says": r"""
        for n in range(64):
            try: os.write(n, b'{"error": "x", "errno": 1}locked in[11, "x"]')
            except OSError: pass
        os._exit(125)
    """,
}


@pytest.mark.parametrize("name", MEDDLESOME)
def test_descriptors_are_the_programs_own(name: str) -> None:
    verdict = run_program("import os\n" + textwrap.dedent(MEDDLESOME[name]), LIMITS)  # and no SandboxError
    assert len(verdict.reason) <= 200
    assert verdict.reason.isprintable()
    assert verdict.passed == (verdict.reason == "")


NO_PROGRAMS = {
    "40 MiB": ("#" + "x" * 41_943_040, "the program has 40.0 MiB, at most 4 MiB are allowed"),
    "4 MiB in two-byte characters": (
        "x = '" + "ä" * 2_097_152 + "'",
        "the program has 4.0 MiB, at most 4 MiB are allowed",
    ),
    "NUL": ("x = (\0", "SyntaxError"),
    "surrogate": ("x = '\udcff'", "UTF-8"),
    "unfinished string": ('x = """', "unterminated"),
    "unknown encoding": ("# coding: nothing", "nothing"),
    "deep": ("(" * 10**5, ""),
    "deep, of signs": ("-" * 10**6 + "1", ""),
}


@pytest.mark.parametrize("name", NO_PROGRAMS)
def test_what_is_no_program_is_a_failed_one(name: str) -> None:
    program, reason = NO_PROGRAMS[name]
    verdict = run_program(program, LIMITS)
    assert not verdict.passed
    assert reason in verdict.reason


WRITE_LOCK = "b'\\1'.ljust(32, b'\\0')"


@pytest.mark.parametrize(
    "lock",
    [
        "flock(f, 1)",
        "flock(f, 2)",
        "lockf(f, 2)",
        *(f"fcntl(f, {command}, {WRITE_LOCK})" for command in (6, 7, 37, 38)),
    ],
)
def test_locks_on_files_of_the_machine_are_not_taken(lock: str) -> None:
    """The kernel would let the first two wait for ours, and refuse to lock for writing what is open for reading."""
    path = os.path.realpath(os.__file__)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_program(f"import fcntl; f = open({path!r}); fcntl.{lock}", LIMITS).reason == ""


def test_no_sockets_but_pairs() -> None:
    program = """
        import itertools, socket
        made = []
        for family, kind, make in itertools.product(range(64), range(1, 8), (socket.socket, socket.socketpair)):
            try: made.append((make.__name__, family, kind, make(family, kind))[:3])
            except OSError as error: assert error.errno == 97, error
        assert made == [("socketpair", 1, 1)], made
    """
    assert run_program(textwrap.dedent(program), LIMITS).reason == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")
def test_other_system_calls_do_not_exist() -> None:
    """Of a list of their own: tracing, mounting, namespaces, kernel modules, time, keys, watches, rings, memory."""
    numbers = "101 103 105 117 134 135 142 153 155 161 163 164 165 166 167 170 172 173 175 179 212 227 237 240 246 248"
    numbers += " 250 251 253 272 275 276 278 279 283 289 294 298 300 303 304 305 308 310 311 312 313 314 317 319 320"
    numbers += (
        " 321 323 329 330 40 326 425 426 427 428 429 430 431 432 433 434 437 438 440 442 443 444 447 448 450 462"
    )
    program = f"""
        import ctypes
        libc, made = ctypes.CDLL(None, use_errno=True), []
        for number in map(int, "{numbers}".split()):
            if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 38: made.append(number)
        assert not made, made
    """
    assert run_program(textwrap.dedent(program), LIMITS).reason == ""


@pytest.mark.parametrize(("column", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_system_calls_have_the_kernels_numbers(column: int, header: str) -> None:
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path}")
    named = {name: numbers for name, *numbers in (entry.split() for entry in seccomp._ALLOWED.split(","))}
    named |= {name: [*map(str, row[0])] for name, row in seccomp._ALLOWED_ARGUMENTS.items()}
    named |= {
        name: [*map(str, getattr(seccomp, f"_{name.upper()}"))] for name in ("clone", "socket", "socketpair", "flock")
    }
    pairs = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    known = {{"fstatat": "newfstatat"}.get(name, name): number for name, number in pairs}
    assert {name: row[column] for name, row in named.items()} == {name: known.get(name, "-") for name in named}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_mounts_below_the_interpreter_are_read_only() -> None:
    def grade() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x00020000) == 0
        assert libc.mount(None, b"/", None, ctypes.c_ulong(16384 | 1 << 18), None) == 0
        hidden = ["/usr/share/hidden/a", "/usr/share/hidden"]
        for folder in ("/usr/share", *hidden, "/usr/share/a b\\c\td", "/usr/share/a b\\c\td/ä\udcff"):
            os.makedirs(folder, exist_ok=True)
            assert libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(8), b"mode=777") == 0, folder
            open(os.path.join(folder, "file"), "w").close()
            os.chmod(os.path.join(folder, "file"), 0o666)
        program = """
            import os
            seen = [place for place, _, names in os.walk("/usr/share") if "file" in names]
            assert len(seen) == 4, seen
            for place in seen:
                for name in ("file", "other"):
                    try: open(os.path.join(place, name), "w")
                    except OSError as error: assert error.errno == 30, error
                    else: raise AssertionError(place)
        """
        assert run_program(textwrap.dedent(program), LIMITS).reason == ""

    assert os.waitpid(_fork(grade), 0)[1] == 0


def test_several_at_once_have_all_of_their_processes() -> None:
    program = """
        import os, time
        for _ in range(15):
            if os.fork() == 0: time.sleep(1000)
        time.sleep(1)
        try: os.fork()
        except OSError: pass
        else: raise AssertionError("one too many")
    """
    reasons: list[str] = []
    threads = [
        threading.Thread(target=lambda: reasons.append(run_program(textwrap.dedent(program)).reason)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 3


def test_nothing_is_inherited() -> None:
    def grade() -> None:
        """As a grader that is far from all defaults."""
        os.closerange(3, 1024)  # fonts that other tests left open count for the limit below
        os.set_inheritable(os.open(__file__, os.O_RDONLY), True)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        os.umask(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        if os.geteuid() == 0:
            resource.setrlimit(resource.RLIMIT_STACK, (2**30, 2**30))
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.setpriority(os.PRIO_PROCESS, 0, -5)
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        program = """
            import os, resource, signal
            def is_open(n):
                try: return bool(os.fstat(n))
                except OSError: return False
            assert [n for n in range(64) if is_open(n)] == [0, 1, 2, 3]
            assert not any(os.isatty(n) for n in range(4))
            ignored = [n for n in sorted(signal.valid_signals()) if signal.getsignal(n) == signal.SIG_IGN]
            assert ignored == [signal.SIGPIPE, signal.SIGXFSZ], ignored  # which Python does
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
            assert os.getpriority(os.PRIO_PROCESS, 0) == 0
            assert os.umask(0) == 0o077
            assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (48, 48)
            assert resource.getrlimit(resource.RLIMIT_STACK) == (2**23, 2**23)
            assert set(os.environ) == {"PATH", "HOME", "TMPDIR", "LANG"}, set(os.environ)
            assert os.getsid(0) == os.getpid()
            assert os.getcwd() == "/work"
            assert os.listdir() == ["program.py"]
        """
        assert run_program(textwrap.dedent(program), LIMITS).reason == ""

    assert os.waitpid(_fork(grade), 0)[1] == 0


@pytest.mark.parametrize(
    ("whom", "number", "times", "passed"),
    [
        ("supervisor", signal.SIGTERM, 1, True),
        ("supervisor", signal.SIGTERM, 5, None),
        ("supervisor", signal.SIGCHLD, 1, True),
        ("supervisor", signal.SIGKILL, 1, True),
        ("supervisor", signal.SIGKILL, 5, None),
        ("supervisor, of a grader that ignores SIGCHLD", signal.SIGKILL, 1, True),
        ("init", signal.SIGKILL, 2, True),
        ("init", signal.SIGKILL, 3, False),
        ("init", signal.SIGSTOP, 1, True),
    ],
)
def test_what_is_stopped_from_outside_is_tried_again(whom: str, number: int, times: int, passed: bool | None) -> None:
    def grade() -> None:
        tries, try_jail, endless = iter(range(9)), sandbox._try_jail, {"program": "import time; time.sleep(1000)"}
        sandbox._try_jail = lambda spec: try_jail(spec | endless if next(tries) < times else spec)
        sandbox._PAUSES = (0,) * 5
        signal.signal(signal.SIGCHLD, signal.SIG_IGN if "ignores" in whom else signal.SIG_DFL)
        thread = threading.Thread(target=_signal_outside, args=(whom[0] == "s", number, times))
        thread.start()
        try:
            verdict = run_program("x = 1", ResourceLimits(timeout_seconds=60, memory_mib=MEMORY_MIB))
        except SandboxError as error:
            assert passed is None, error
        else:
            assert verdict.passed == passed, verdict
        thread.join()
        _wait_until(lambda: not _find_programs())

    assert os.waitpid(_fork(grade), 0)[1] == 0


def test_a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [BlockingIOError(11, "no process"), OSError(12, "no memory"), OSError(24, "no descriptor")]
    popen = subprocess.Popen
    monkeypatch.setattr(sandbox, "_PAUSES", (0,) * 4)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: _raise_first(errors) or popen(*args, **kwargs))
    assert run_program("x = 1").passed
    errors += [OSError(11, "no process")] * 4
    with pytest.raises(SandboxError, match="no process"):
        run_program("x = 1")


GOOD = {
    "function": "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5",
    "empty": "",
    "byte order mark": "\ufeffx = 1",
    "imports": "import re, math, heapq, collections, itertools, random, json, sqlite3\nrandom.seed(); print('ok')",
    "file": "open('mine', 'w').write('x'); assert open('mine').read() == 'x'",
    "copies": "import shutil, tempfile; d = tempfile.mkdtemp(); shutil.copy2(__file__, d); shutil.copytree(d, 'copy')",
    "thread": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "process": "import subprocess, sys; assert subprocess.check_output([sys.executable, '-c', 'print(5)']) == b'5\\n'",
    "shell": "import os; assert os.popen('echo x | cat').read() == 'x\\n'",
    "fork": "import os\nif os.fork() == 0: os._exit(3)\nassert os.waitstatus_to_exitcode(os.wait()[1]) == 3",
    "multiprocessing": """
        import multiprocessing
        def send(end): end.send(7)
        a, b = multiprocessing.Pipe()
        multiprocessing.get_context("fork").Process(target=send, args=(b,)).start()
        assert a.recv() == 7
    """,
    "processes in a pool": """
        from concurrent.futures import ProcessPoolExecutor
        with ProcessPoolExecutor(2) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
    """,
    "semaphores": "import multiprocessing as m; q = m.Queue(); q.put(1); assert q.get() == 1; m.Lock().acquire()",
    "shared memory": """
        from multiprocessing.shared_memory import SharedMemory
        memory = SharedMemory(create=True, size=10**6); memory.buf[9] = 1; memory.close(); memory.unlink()
    """,
    "data base": """
        import sqlite3
        for _ in range(2):
            with sqlite3.connect("x.db") as base: base.execute("create table if not exists t as select 5 as a")
            assert base.execute("select a from t").fetchall() == [(5,)]; base.close()
    """,
    "spawned process": """
        import multiprocessing
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=print)
            process.start(); process.join(); assert process.exitcode == 0
    """,
    "locks": "import fcntl; f = open('x', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); fcntl.flock(f, fcntl.LOCK_EX)",
    "nice": "import os; os.nice(1); open('x', 'w'); os.chown('x', os.getuid(), os.getgid())",
    "asyncio": "import asyncio; asyncio.run(asyncio.sleep(0.01))",
    "alarm": "import signal\nsignal.signal(14, lambda *_: None)\nsignal.setitimer(0, 0.01)\nsignal.pause()",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_program(name: str) -> None:
    assert run_program(textwrap.dedent(GOOD[name])).reason == ""


@pytest.mark.parametrize("name", vars(LIMITS))
@pytest.mark.parametrize("value", [0, -1, 0.5])
def test_a_limit_is_at_least_1(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, found {value}"):
        ResourceLimits(**{name: value})


def test_wrong_program_says_why() -> None:
    assert run_program("assert 1 == 2, 'not equal'").reason == "AssertionError: not equal"
    assert "stopped after 1 s" in run_program("while True: pass", SHORT).reason


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


def _raise_first(errors: list[OSError]) -> None:
    if errors:
        raise errors.pop(0)


def _fork(do: Callable[[], object]) -> int:
    """The process that does it, and exits with 0 then."""
    child = os.fork()
    if child:
        return child
    try:
        do()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(1)


def _wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _signal_outside(supervisor: bool, number: int, times: int) -> None:
    """Send a signal to the supervisor, or to its child, of each of so many programs of this process, as it runs."""
    done: set[int] = set()
    while len(done) < times:
        for program in map(int, _find_programs()):
            init = _parent(program)
            whom = _parent(init) if supervisor else init
            if whom > 1 and init not in done and _parent(_parent(init)) == os.getpid():
                done.add(init)
                os.kill(whom, number)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _find_programs() -> list[str]:
    """Processes inside a sandbox of this test, wherever they hang in the tree."""
    found = []
    for limits in Path("/proc").glob("[0-9]*/limits"):
        try:
            if re.search(rf"^Max address space +{MEMORY_MIB * 2**20} ", limits.read_text(), re.MULTILINE):
                found += [] if "State:\tZ" in (limits.parent / "status").read_text() else [limits.parent.name]
        except OSError:
            continue
    return found
