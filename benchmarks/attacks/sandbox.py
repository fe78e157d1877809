"""Attacks: programs that a model could write, against the sandbox."""

import contextlib
import os
import random
import re
import signal
import string
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tsdkd.evaluation.sandbox import ProgramResult, ResourceLimits, run_program

_SECRET = "a secret of the grader"


def _limits(rng: random.Random, seconds: int = 5) -> ResourceLimits:
    """With an amount of memory by which the program's processes are found."""
    return ResourceLimits(timeout_seconds=seconds, memory_mib=rng.randrange(400, 700))


def _attack(program: str, limits: ResourceLimits) -> ProgramResult:
    """Whatever becomes of the program: in time, with a result, and with nothing left."""
    start = time.monotonic()
    result = run_program(program, limits)
    assert time.monotonic() - start < limits.timeout_seconds + 30
    assert result.passed == (result.reason == ""), result
    assert len(result.reason) <= 200, result
    assert result.reason.isprintable(), result
    assert not _survivors(limits)
    return result


def _survivors(limits: ResourceLimits) -> list[str]:
    memory = re.compile(rf"^Max address space +{limits.memory_mib * 2**20} ", re.MULTILINE)
    return [
        path.name for path in Path("/proc").glob("[0-9]*") if memory.search(_read(path / "limits")) and _lives(path)
    ]


def _lives(process: Path) -> bool:
    return re.search("State:\t[^ZX]", _read(process / "status")) is not None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def _attempt(*statements: str) -> str:
    """Python that tries each statement."""
    return "".join(
        f"try:\n{textwrap.indent(statement, '    ')}\nexcept BaseException: pass\n" for statement in statements
    )


def _write_stubborn_program(rng: random.Random) -> str:
    """One that never ends, after random preparations against its end."""
    preparations = [
        "libc.prctl(1, 0, 0, 0, 0)",
        f"libc.syscall({rng.choice((157, 167))}, 1, 0, 0, 0, 0)",
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
        "os.setsid()",
        "os.setpgid(0, 0)",
        "if os.fork(): os._exit(0) if os.getppid() != 1 else os.wait()",
        "os.fork()",
        f"os.kill(1, {rng.randrange(1, 65)})",
        f"os.kill(os.getppid(), {rng.randrange(1, 65)})",
        f"import resource\nresource.prlimit(1, {rng.randrange(16)}, (0, 0))",
        "os.closerange(0, 64)",
        "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
        "import threading\nthreading.Thread(target=time.sleep, args=(999,)).start()",
        "libc.ptrace(16, 1, 0, 0)",
        "os.rename('program.py', 'x')",
    ]
    ends = [
        "time.sleep(1000)",
        "while True: pass",
        "while True:\n    try: os.fork()\n    except OSError: time.sleep(0.001)",
        "while True: os.kill(os.getpid(), signal.SIGSTOP)",
        "os.kill(-1, signal.SIGSTOP)\ntime.sleep(1000)",
        "os.execv('/bin/sleep', ['sleep', '1000'])",
        "os.execv('/bin/sh', ['sh', '-c', 'trap \"\" 1 2 3 15; while :; do :; done'])",
        "while True:\n    try:\n        if os.fork() == 0: continue\n    except OSError: pass\n    os.wait()",
        "while True:\n    try:\n        for n in range(1, 65): os.kill(1, n)\n    except OSError: pass",
    ]
    chosen = rng.sample(preparations, rng.randrange(len(preparations)))
    return f"import ctypes, os, signal, time\nlibc = ctypes.CDLL(None)\n{_attempt(*chosen)}{rng.choice(ends)}\n"


def _outlive_the_time(rng: random.Random, folder: Path) -> None:
    assert not _attack(_write_stubborn_program(rng), _limits(rng, 1)).passed


def _outlive_the_grader(rng: random.Random, folder: Path) -> None:
    """Kill the grader as early as it starts the sandbox, or as late as the program runs."""
    limits, program = _limits(rng, 900), _write_stubborn_program(rng)
    delay = rng.uniform(0, 0.5)
    grader = os.fork()
    if grader == 0:
        try:
            run_program(program, limits)
        finally:
            os._exit(0)
    time.sleep(delay)
    descendants = _descendants(grader)
    os.kill(grader, rng.choice((signal.SIGKILL, signal.SIGTERM)))
    os.waitpid(grader, 0)
    deadline = time.monotonic() + 30
    while _survivors(limits) or any(map(_lives, descendants)):
        assert time.monotonic() < deadline, (descendants, _survivors(limits))
        time.sleep(0.05)


def _descendants(root: int) -> list[Path]:
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        if stat := _read(process / "stat"):
            parents[process.name] = stat.rpartition(")")[2].split()[1]
    found, layer = [], {str(root)}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found += layer
    return [Path("/proc", pid) for pid in found]


def _meddle_with_descriptors(rng: random.Random, folder: Path) -> None:
    operations = [
        "os.ftruncate(fd, {number})", "os.pwrite(fd, {data!r}, {number})", "os.write(fd, {data!r})", "os.close(fd)",
        "os.lseek(fd, {number}, 0)", "os.dup2(fd, {other})", "os.dup2({other}, fd)", "os.set_blocking(fd, False)",
        "os.read(fd, {number})", "os.posix_fallocate(fd, 0, {number})", "os.sendfile(fd, {other}, 0, {number})",
        "os.splice(fd, {other}, {number})", "os.copy_file_range(fd, {other}, {number})", "os.fchmod(fd, 0)",
        "fcntl.fcntl(fd, {number} % 1100, {number})", "mmap.mmap(fd, {number} % 10**7)[0:1] = b'x'", "os.fsync(fd)",
        "os.set_inheritable(fd, True)", "socket.socket(fileno=fd).send({data!r})", "fcntl.ioctl(fd, {number} % 2**16)",
        "os.write(fd, {data!r} * 10**5)",
    ]  # fmt: skip
    data = [b"locked in", b'{"error": "x", "errno": 1}', b"\0" * 9, bytes(range(256)), b"x" * 10**4, b"\x1b[2J\n"]
    statements = []
    for _ in range(rng.randrange(1, 30)):
        fill = {"number": int(10 ** rng.uniform(0, 9)) - 1, "other": rng.randrange(8), "data": rng.choice(data)}
        statements.append(
            f"fd = {rng.choice((0, 1, 2, 3, 3, rng.randrange(64)))}\n" + rng.choice(operations).format(**fill)
        )
    ends = ["", "os._exit(0)", "os._exit(125)", "os.kill(os.getpid(), 9)", "1 / 0", "raise SystemExit(b'\\xff')"]
    _attack(f"import fcntl, mmap, os, socket\n{_attempt(*statements)}{rng.choice(ends)}", _limits(rng))


def _open_sockets(rng: random.Random, folder: Path) -> None:
    family, kind, protocol = (
        rng.randrange(64),
        rng.randrange(12),
        rng.choice((0, 0, 0, 1, 6, 17, 255, rng.randrange(300))),
    )
    flags = rng.choice((0, 0o2000000, 0o4000))
    attempts = [
        f"assert socket.socket({family}, {kind} | {flags}, {protocol})",
        f"assert libc.socket({family}, {kind} | {flags}, {protocol}) >= 0",
        f"assert libc.socket({family} | 1 << 40, {kind}, {protocol}) >= 0",
        f"assert libc.syscall({rng.choice((41, 198))}, {family}, {kind}, {protocol}) > 3",
        "socket.create_connection(('127.0.0.1', 22), 1)",
        "socket.create_connection(('::1', 22), 1)",
        "socket.create_server(('', 0))",
        "socket.getaddrinfo('example.org', 80)",
        "asyncio.run(asyncio.start_unix_server(print, 'x'))",
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "a, b = socket.socketpair(); a.connect('x')",
        "a, b = socket.socketpair(); a.sendto(b'x', '\\0x')",
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])",
        "urllib.request.urlopen('http://127.0.0.1:80')",
    ]
    program = f"import asyncio, ctypes, socket, urllib.request\nlibc = ctypes.CDLL(None)\n{rng.choice(attempts)}"
    assert not _attack(program, _limits(rng)).passed


def _call_the_kernel_at_random(rng: random.Random, folder: Path) -> None:
    """Random system calls with random arguments; whatever they do, the machine outside is the same."""
    host, clock = os.uname(), time.time() - time.monotonic()
    program = f"""
        import ctypes, os, random, signal
        libc, rng = ctypes.CDLL(None), random.Random({rng.random()})
        buffer = ctypes.create_string_buffer(bytes(rng.randrange(256) for _ in range(4096)), 2**16)
        def argument():
            kinds = [0, 1, 2, 3, -1, -100, rng.randrange(64), rng.getrandbits(31), rng.getrandbits(64)]
            return ctypes.c_long(rng.choice([*kinds, *[ctypes.addressof(buffer)] * 4]))
        for _ in range({rng.randrange(1, 40)}):
            if os.fork() == 0:
                signal.alarm(1)
                for _ in range(200):
                    libc.syscall(ctypes.c_long(rng.randrange(480)), *[argument() for _ in range(6)])
                os._exit(0)
            rng.random()
            os.wait()
    """
    _attack(textwrap.dedent(program), _limits(rng, 2))
    assert os.uname() == host
    assert abs(time.time() - time.monotonic() - clock) < 1


def _make_forbidden_calls(rng: random.Random, folder: Path) -> None:
    """Calls that must not even exist, on x86-64."""
    numbers = [101, 134, 155, 161, 165, 166, 169, 170, 172, 173, 175, 212, 227, 237, 240, 246, 248, 250, 253, 272, 275]
    numbers += [278, 298, 300, 304, 308, 310, 312, 317, 319, 321, 323, *range(425, 435), 438, 440, 442, 447, 450, 462]
    number, high = rng.choice(numbers), rng.choice((0, 1 << 32, 1 << 63))
    arguments = ", ".join(str(rng.choice((0, 1, -1, 2**31, 0x10000000))) for _ in range(6))
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program += f"assert libc.syscall(ctypes.c_ulong({number | high}), {arguments}) != -1 or ctypes.get_errno() != 38"
    assert not _attack(program, _limits(rng)).passed


def _new_namespaces(rng: random.Random, folder: Path) -> None:
    flags = sum(rng.sample([1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)], rng.randrange(1, 8)))
    attempts = [
        f"libc.unshare({flags}) == 0",
        f"libc.syscall(56, {flags} | 17, 0, 0, 0, 0) >= 0",
        f"libc.syscall(435, struct.pack('8Q', {flags}, 0, 0, 0, 17, 0, 0, 0), 64) >= 0",
        f"libc.setns({rng.randrange(8)}, {flags}) == 0",
        "libc.chroot(b'/work') == 0",
        "libc.setuid(0) == 0",
        "libc.setresgid(0, 0, 0) == 0",
        f"libc.mount(b'none', b'/work', {rng.choice((b'tmpfs', b'proc', b'sysfs', b'overlay'))!r}, 0, 0) == 0",
        f"libc.umount2({rng.choice((b'/usr', b'/', b'/work', b'/dev/null'))!r}, 2) == 0",
        "os.mknod('disk', 0o60600, os.makedev(8, 0)) is None",
        "libc.prctl(38, 0, 0, 0, 0) == 0",
        f"libc.prctl({rng.choice((4, 8, 22, 24, 28, 36, 47))}, 1, 0, 0, 0) == 0",
    ]
    program = f"import ctypes, os, struct\nlibc = ctypes.CDLL(None)\nassert {rng.choice(attempts)}"
    assert not _attack(program, _limits(rng)).passed


def _read_outside(rng: random.Random, folder: Path) -> None:
    """The grader's files, by random names and ways."""
    secret = folder / "".join(rng.choices(string.ascii_letters + " \\ä'\"", k=8))
    secret.write_text(_SECRET)
    secret.chmod(0o666)
    places = [str(secret), "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/maps", "/sys/kernel", "/root",
              "/home", "/tmp", "/var", "/dev/kmsg", "/dev/tty", "/dev/ptmx", "/run", str(Path.home()),
              __file__, "/.old-root", "/proc", "/boot", "/srv", "/opt"]  # fmt: skip
    python = os.path.realpath(os.__file__)
    path = rng.choice([place for place in places if not python.startswith(place + "/")])
    ways = [
        "os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read()",
        "os.stat(path)",
        "os.link(path, 'x')",
        "os.symlink(path, 'x'); os.stat('x')",
        f"os.stat('{'../' * rng.randrange(1, 40)}' + path[1:])",
        f"os.chdir('{'../' * rng.randrange(1, 40)}'); os.stat(path[1:])",
        "os.rename(path, 'x')",
        "shutil.copy(path, 'x')",
        f"os.open(path[1:], 0, dir_fd={rng.randrange(16)})",
        "subprocess.run(['cat', path], check=True)",
        f"os.stat('/proc/{rng.choice(('self', '1', 'thread-self'))}/root' + path)",
        f"os.stat('/dev/fd/{rng.randrange(10)}')",
        "libc = ctypes.CDLL(None); assert libc.open(path.encode(), 0) >= 0",
    ]
    program = f"import ctypes, os, shutil, subprocess\npath = {path!r}\n{rng.choice(ways)}"
    assert not _attack(program, _limits(rng)).passed
    assert secret.read_text() == _SECRET


def _write_outside(rng: random.Random, folder: Path) -> None:
    """What the sandbox shows of the machine stays as it is."""
    shown = [
        os.__file__,
        os.path.dirname(os.__file__),
        random.__file__,
        "/usr/bin",
        "/usr/lib",
        "/bin/sh",
        "/usr",
        "/",
    ]
    path = os.path.realpath(rng.choice(shown))
    ways = [
        "open(path, 'r+')", "open(path, 'a')", "open(path + '/x', 'w')", "os.unlink(path)", "os.rmdir(path)",
        "os.rename(path, path + 'x')", "os.rename(path, '/work/x')", "os.chmod(path, 0o777)", "os.utime(path)",
        "os.truncate(path, 0)", "os.link(path, path + 'x')", "os.symlink('x', path + 'x')", "os.mkfifo(path + 'x')",
        "os.mkdir(path + 'x')", "os.setxattr(path, 'user.x', b'x')", "os.chown(path, os.getuid(), os.getgid())",
        "mmap.mmap(os.open(path, os.O_RDONLY), 1)[0:1] = b'x'", "os.open(path, os.O_RDWR | os.O_CREAT)",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)", "os.open(path, os.O_TMPFILE | os.O_RDWR)",
        "subprocess.run(['touch', path], check=True)",
        "os.link(path, '/work/x')", "fcntl.fcntl(os.open(path, 0), fcntl.F_NOTIFY, 2)",
    ]  # fmt: skip
    before = os.stat(path)
    program = f"import fcntl, mmap, os, subprocess\npath = {path!r}\n{rng.choice(ways)}"
    assert not _attack(program, _limits(rng)).passed
    after = os.stat(path)
    assert (before.st_mode, before.st_size, before.st_mtime_ns) == (after.st_mode, after.st_size, after.st_mtime_ns)


def _use_everything_up(rng: random.Random, folder: Path) -> None:
    hogs = [
        "keep.append(bytearray({n}))", "keep.append(open(str(len(keep)), 'wb')); keep[-1].write(bytes({n}))",
        "keep.append(os.pipe())", "keep.append(socket.socketpair())", "os.mkdir(str(len(keep))); keep.append(0)",
        "keep.append(mmap.mmap(-1, {n}))", "threading.Thread(target=time.sleep, args=(99,)).start()", "os.fork()",
        "os.write(2, b'x' * {n})", "os.write(3, b'x' * {n})", "print('x' * {n}, flush=True)", "keep.append('x' * {n})",
        "os.symlink('x' * 4000, str(len(keep))); keep.append(0)", "keep.append(10 ** {n})", "keep.append(keep[:])",
        "os.mkdir('x'); os.chdir('x')", "open('x', 'wb').truncate({n} * len(keep)); keep.append(0)",
        "keep.append(select.epoll())", "keep.append(os.open('/dev/zero', 0))", "keep.append(os.dup(3))",
    ]  # fmt: skip
    chosen = [hog.format(n=int(10 ** rng.uniform(0, 8))) for hog in rng.sample(hogs, rng.randrange(1, 4))]
    body = (
        textwrap.indent(_attempt(*chosen), "    ")
        if rng.random() < 0.7
        else textwrap.indent("\n".join(chosen), "    ")
    )
    program = f"import mmap, os, select, socket, threading, time\nkeep = []\nwhile True:\n{body}"
    assert not _attack(program, _limits(rng, 1)).passed


def _signal_from_outside(rng: random.Random, folder: Path) -> None:
    """Someone else's signal to the supervisor or to init, at any time, is no verdict on the program."""
    number, target = rng.choice((signal.SIGTERM, signal.SIGKILL, signal.SIGCHLD, signal.SIGSTOP)), rng.randrange(2)
    if (number, target) == (signal.SIGSTOP, 0):  # which stops the time, too
        return
    limits, seconds, delay = _limits(rng, 60), rng.uniform(0, 0.5), rng.uniform(0, 0.6)
    ignores = rng.random() < 0.5
    grader = os.fork()
    if grader == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN if ignores else signal.SIG_DFL)
        try:
            os._exit(not run_program(f"import time; time.sleep({seconds})", limits).passed)
        finally:
            os._exit(1)
    time.sleep(delay)
    for process in _descendants(grader)[target : target + 1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), number)
    assert os.waitpid(grader, 0)[1] == 0, (number, target, delay, ignores)


def _be_no_program(rng: random.Random, folder: Path) -> None:
    size = int(10 ** rng.uniform(0, 6))
    texts: list[Callable[[], str]] = [
        lambda: "".join(chr(rng.randrange(0x110000)) for _ in range(size // 10)),
        lambda: "".join(chr(rng.randrange(128)) for _ in range(size)),
        lambda: rng.choice("([{-~'\"\\\0\r\x1a\ud800\udfff#x;:@") * size,
        lambda: "x = 1" + rng.choice(("\0", "\\", '"""', "\ud800", "\x0c", "\x85", "\u2028('")),
        lambda: "x" * rng.randrange(2**22 - 200, 2**24),
        lambda: f"# coding: {rng.choice(('utf-7', 'utf-16', 'rot13', 'x', 'idna', 'cp037', 'unicode_escape'))}\nx = (",
        lambda: "def f():\n" + "".join(" " * i + "if 1:\n" for i in range(1, rng.randrange(2, 200))),
        lambda: "raise " + rng.choice(("SystemExit", "SystemExit(0)", "KeyboardInterrupt", "MemoryError")),
        lambda: f"import os; os._exit({rng.randrange(-300, 300)})",
        lambda: f"import os; os.kill(os.getpid(), {rng.choice((1, 2, 3, 4, 6, 7, 8, 9, 11, 14, 15, 24, 31))})",
        lambda: f"import os; os.execv('/bin/{rng.choice(('true', 'false', 'sh', 'nothing'))}', ['x', '-c', 'exit 0'])",
    ]  # fmt: skip
    _attack(rng.choice(texts)(), _limits(rng))


def _several_at_once(rng: random.Random, folder: Path) -> None:
    """None takes from another: processes, memory of its directory, or names."""
    count, limits = rng.randrange(2, 5), _limits(rng, 60)
    children, size = rng.randrange(10, 16), rng.randrange(1, 30)
    program = f"""
        import os, time
        for i in range({size}): open(str(i), "wb").write(bytes(2**20 - 10**4))
        children = [os.fork() or (time.sleep(0.5), os._exit(0)) for _ in range({children})]
        for child in children: assert os.waitpid(child, 0)[1] == 0
    """
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda _: run_program(textwrap.dedent(program), limits), range(count)))
    assert all(result.passed for result in results), results
    assert not _survivors(limits)


def _still_grade(rng: random.Random, folder: Path) -> None:
    """Programs without malice, right or wrong, are graded as they deserve."""
    numbers = [rng.randrange(-99, 99) for _ in range(rng.randrange(1, 50))]
    body, right = rng.choice([
        (f"assert sorted({numbers}) == {sorted(numbers)}", True),
        (f"assert sum({numbers}) == {sum(numbers) + 1}", False),
        (f"import threading\nt = threading.Thread(target=sum, args=({numbers},))\nt.start(); t.join()", True),
        (f"import subprocess\nassert subprocess.check_output(['echo', '{numbers[0]}']) == b'{numbers[0]}\\n'", True),
        (f"import json; json.dump({numbers}, open('x', 'w')); assert json.load(open('x')) == {numbers}", True),
        (f"import asyncio\nasync def f(): return {numbers[0]}\nassert asyncio.run(f()) == {numbers[0]}", True),
        (f"import multiprocessing as m; q = m.Queue(); q.put({numbers}); assert q.get() == {numbers}", True),
        (f"import multiprocessing as m\nwith m.Pool(2) as p: assert p.map(abs, {numbers}) == {[*map(abs, numbers)]}",
         True),
        (f"import fcntl; f = open('x', 'w'); fcntl.lockf(f, {rng.randrange(1, 3)}); f.write('{numbers[0]}')", True),
        (f"import sqlite3; b = sqlite3.connect('x'); b.execute('create table t as select {numbers[0]}')", True),
        (f"import json; json.load(open('x{numbers[0]}'))", False),
        (f"print({numbers}); raise ValueError({numbers[0]})", False),
    ])  # fmt: skip
    assert _attack(body, _limits(rng, 60)).passed == right


ATTACKS: dict[str, Callable[[random.Random, Path], None]] = {
    "outlives its time": _outlive_the_time,
    "outlives a killed grader": _outlive_the_grader,
    "descriptors": _meddle_with_descriptors,
    "sockets": _open_sockets,
    "system calls at random": _call_the_kernel_at_random,
    "forbidden system calls": _make_forbidden_calls,
    "namespaces and privileges": _new_namespaces,
    "reads outside": _read_outside,
    "writes outside": _write_outside,
    "uses everything up": _use_everything_up,
    "signals from outside": _signal_from_outside,
    "is no program": _be_no_program,
    "several at once": _several_at_once,
    "good ones are graded": _still_grade,
}
