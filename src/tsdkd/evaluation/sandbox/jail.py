"""The process that isolates a model's program. It is run by path in a process of its own, and uses only the stdlib.

It becomes the *supervisor*, which stays outside, and starts the *init* of new namespaces (users, processes, network,
mounts, IPC, host name), which starts the *program*. The program can't reach the supervisor, and the kernel protects an
init from the processes in its namespaces, so the program can't prolong its life. The supervisor kills init when the
time is over, or when it is told to. The kernel kills init when the supervisor dies, the supervisor when the grader
dies, and all processes inside when init dies.

The program's root is a small file system in memory. It has the interpreter, read-only, and an empty working directory;
no other file of the machine can be named there. The program has no privileges, few resources and few system calls. The
files with its error output and its last line are read when all processes inside are dead.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import resource
import signal
import sys
from typing import Any

# CLONE_NEW...: mounts, cgroup, host name, IPC, processes, network; and users
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_NEW_USERS = 0x10000000
_CLONE = {"x86_64": 56, "aarch64": 220}
_NOBODY = 65534
_UNUSED_USERS = 0x70000000  # systemd recommends the 2^28 ids from here on; no user has them
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_WAKING = {signal.SIGCHLD, signal.SIGTERM}
_FAILED = 125
_UNFINISHED = json.dumps([errno.EAGAIN, "init ended before it ran the program"])
_ID_MAPS = ("uid_map", "gid_map")
_SAFE = os.ST_RDONLY | os.ST_NOSUID
_OLD_ROOT, _WORK = "/.old-root", "/work"

_libc = ctypes.PyDLL(None, use_errno=True)


def main() -> int:
    """Run the program that stdin describes, and print the result.

    The result has `error` and `errno` if there is no verdict on the program, and `killed` if someone else killed init.
    """
    spec = json.load(sys.stdin)
    try:
        result = _supervise(spec)
    except OSError as error:
        result = {"error": error.strerror or str(error), "errno": error.errno}
    print(json.dumps(result))
    return 0


def _supervise(spec: dict[str, Any]) -> dict[str, Any]:
    _die_with_parent()
    if os.getppid() != spec["grader"]:  # it died earlier
        sys.exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)
    for number in _WAKING:  # a process that ignores the signal isn't told of the end of a child
        signal.signal(number, signal.SIG_DFL)
    spec["user"] = _choose_user()
    report, to_report = os.pipe()
    from_go, go = os.pipe()
    errors, end = os.memfd_create("errors"), os.memfd_create("end")  # the program may write anything into them
    init = _clone()
    if init == 0:
        os.close(report)
        os.close(go)
        os._exit(_run_init(spec, from_go, to_report, errors, end))
    os.close(to_report)
    os.close(from_go)
    try:
        os.read(report, 1)
        _map_ids(init)
        os.write(go, b".")
        awoken_by = signal.sigtimedwait(_WAKING, spec["seconds"])
        ended = os.waitid(os.P_PID, init, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    finally:
        os.kill(init, signal.SIGKILL)
        _, status = os.waitpid(init, 0)  # returns when everything inside is dead
    message = os.read(report, 2**16).decode(errors="replace")
    if message != "locked in":
        raise OSError(*json.loads(message.removeprefix("locked in") or _UNFINISHED))
    if awoken_by is not None and (ended is None or ended.si_code != os.CLD_EXITED):
        return {"error": "stopped by a signal from outside", "errno": errno.EAGAIN, "killed": ended is not None}
    return {
        "timed_out": awoken_by is None,
        "exit_code": os.waitstatus_to_exitcode(status),
        "end": os.pread(end, 100, 0).decode(errors="replace"),
        "errors": os.pread(errors, 4096, max(0, os.fstat(errors).st_size - 4096)).decode(errors="replace"),
    }


def _call_libc(name: str, *arguments: Any) -> int:
    value: int = getattr(_libc, name)(*arguments)
    if value == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return value


def _die_with_parent() -> None:
    _call_libc("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _clone() -> int:
    """Fork a child into new namespaces. Unlike `unshare`, this leaves the process itself outside, to map the ids.

    Root can do without a user namespace, on machines that don't allow one.
    """
    number = ctypes.c_long(_CLONE[platform.machine()])
    for namespaces in [_NAMESPACES | _NEW_USERS] + [_NAMESPACES] * (os.geteuid() == 0):
        child: int = _libc.syscall(number, ctypes.c_ulong(namespaces | signal.SIGCHLD), None, None, None, None)
        if child != -1:
            return child
    raise OSError(ctypes.get_errno(), f"no namespaces: {os.strerror(ctypes.get_errno())}")


def _map_ids(init: int) -> None:
    """Map the users of init's namespace, in which the processes of the program are counted separately.

    Root maps every id to itself, so that init can read all files before it changes the program's user. Other users map
    only themselves, to nobody.
    """
    if os.path.samefile("/proc/self/ns/user", f"/proc/{init}/ns/user"):
        texts = {}
    elif os.geteuid() == 0:
        texts = {name: "\n".join(f"{first} {first} {count}" for first, count in _extents(name)) for name in _ID_MAPS}
    else:
        own = zip(_ID_MAPS, (os.geteuid(), os.getegid()), strict=True)
        texts = {"setgroups": "deny", **{name: f"{_NOBODY} {number} 1" for name, number in own}}
    for name, text in (texts | {"oom_score_adj": "1000"}).items():  # the kernel kills it first when memory runs out
        with open(f"/proc/{init}/{name}", "w") as file:
            file.write(text)


def _extents(id_map: str) -> list[tuple[int, int]]:
    """The first id and the size of each range of ids in this namespace."""
    with open(f"/proc/self/{id_map}") as file:
        return [(int(first), int(count)) for first, _, count in map(str.split, file)]


def _choose_user() -> int:
    """The user that runs root's program: an id that no one else has, or nobody in a container, which has few ids."""
    user = _UNUSED_USERS + int.from_bytes(os.urandom(3))
    return user if any(first <= user < first + count for first, count in _extents("uid_map")) else _NOBODY


def _run_init(spec: dict[str, Any], go: int, report: int, errors: int, end: int) -> int:
    """Run the program in a forked child. Returns its exit code."""
    try:
        _die_with_parent()
        os.write(report, b".")
        if not os.read(go, 1):  # the supervisor died earlier
            return _FAILED
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # the kernel doesn't deliver a signal without a handler to an init
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _build_root(spec["paths"], spec["disk"])
        with open(f"{_WORK}/program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(spec["program"])
        program = os.fork()
        if program == 0:
            _become_program(spec, report, errors, end)
        _call_libc("prctl", _DUMPABLE, 0, 0, 0, 0)
        return _wait_for(program)
    except BaseException as error:
        os.write(report, json.dumps([getattr(error, "errno", None), f"{type(error).__name__}: {error}"]).encode())
        return _FAILED


def _wait_for(program: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == program:
            return os.waitstatus_to_exitcode(status) % 256


def _become_program(spec: dict[str, Any], report: int, errors: int, end: int) -> None:
    os.setsid()
    os.chdir(_WORK)
    os.umask(0o077)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor, number in ((null, 0), (null, 1), (errors, 2), (end, 3)):  # all others are closed on exec
        os.dup2(descriptor, number)
    _give_up_privileges(spec["user"])
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
    for name, value in spec["limits"].items():
        _set_limit(getattr(resource, f"RLIMIT_{name}"), value)
    _call_libc("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _install_filter(bytes.fromhex(spec["filter"]))
    os.write(report, b"locked in")
    environment = {"PATH": "/usr/bin:/bin", "HOME": _WORK, "TMPDIR": _WORK, "LANG": "C.UTF-8"}
    os.execve(spec["python"], [spec["python"], "-I", "-B", f"{_WORK}/program.py"], environment)


def _set_limit(limit: int, value: int) -> None:
    """Set a limit, or a lower one if this user may not have more."""
    _, most = resource.getrlimit(limit)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))


def _give_up_privileges(user: int) -> None:
    """Change from root to this user. Privileges of another user exist only in the namespace, and end at exec."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(user, user, user)


def _install_filter(rules: bytes) -> None:
    """Apply the seccomp filter to all further system calls."""
    code = ctypes.create_string_buffer(rules, len(rules))
    program = (len(rules) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(code).to_bytes(8, sys.byteorder)
    _call_libc("prctl", _SECCOMP, 2, program, 0, 0)


def _build_root(paths: list[str], disk: int) -> None:
    """Build the root from `paths`, which are read-only with all mounts below them, and a working directory."""
    os.umask(0o022)
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1024,mode=755")
    os.mkdir("/tmp" + _OLD_ROOT)
    _call_libc("pivot_root", b"/tmp", os.fsencode("/tmp" + _OLD_ROOT))
    os.chdir("/")
    os.mkdir(_WORK)
    _mount("tmpfs", _WORK, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes=4096,mode=777")
    for path in paths:
        if os.path.lexists(_OLD_ROOT + path) and not os.path.lexists(path):
            _bind(path)
    os.symlink(_WORK, "/dev/shm")  # semaphores and shared memory count as files of the program
    with open(f"{_OLD_ROOT}/proc/self/mountinfo", errors="surrogateescape") as file:
        mounts = [line.split()[4:6] for line in file]
    _call_libc("umount2", os.fsencode(_OLD_ROOT), _DETACH)
    os.rmdir(_OLD_ROOT)
    _make_read_only([(_unescape(path), options.split(",")) for path, options in mounts])


def _bind(path: str) -> None:
    """Make a path of the old root available in the new one. A symbolic link is copied."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(_OLD_ROOT + path):
        os.symlink(os.readlink(_OLD_ROOT + path), path)
        return
    if os.path.isdir(_OLD_ROOT + path):
        os.mkdir(path)
    else:
        open(path, "w").close()
    _mount(_OLD_ROOT + path, path, None, _BIND | _REC)


def _unescape(path: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), path)


def _make_read_only(mounts: list[tuple[str, list[str]]]) -> None:
    """Remount everything except the working directory read-only, with the mount options that must be kept."""
    paths = [path for path, _ in mounts if path != _WORK and not (path + "/").startswith(_OLD_ROOT + "/")]
    for path, options in mounts:
        flags = _NOEXEC if "noexec" in options else 0
        if "nodev" in options or not path.startswith("/dev/"):
            flags |= _NODEV
        with contextlib.suppress(OSError):  # it may be hidden below another mount
            if path in paths:
                _mount(None, path, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | flags)
    for path in paths:
        if os.path.exists(path) and os.statvfs(path).f_flag & _SAFE != _SAFE:
            raise OSError(errno.EPERM, f"{path} can't be mounted read-only")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call_libc("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


if __name__ == "__main__":
    sys.exit(main())
