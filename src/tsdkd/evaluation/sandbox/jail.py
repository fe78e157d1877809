"""The program that locks itself in and becomes a model's program. Run by path, from a process of its own; stdlib only.

It moves into namespaces of its own (processes, network, mounts, IPC, host name), where it is the first process: with
it, the kernel kills all that it started. Its root becomes a small file system in memory that holds the interpreter,
read-only, and an empty working directory; nothing else of the machine has a name there. Then it gives up every
privilege, limits itself, and turns into the program. What was its standard output becomes descriptor 3, which starts
with the line "locked in"; the program's own output goes nowhere.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

NOBODY = 65534
_NAMESPACE_FLAGS = {
    "mounts": 0x00020000,
    "host": 0x04000000,
    "ipc": 0x08000000,
    "processes": 0x20000000,
    "network": 0x40000000,
}
_CLONE_NEWUSER = 0x10000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOATIME, _NODIRATIME = 1, 2, 4, 8, 32, 1024, 2048
_BIND, _REC, _PRIVATE, _RELATIME, _DETACH = 4096, 16384, 1 << 18, 1 << 21, 2
_STATVFS_TO_MOUNT = {
    1: _RDONLY,
    2: _NOSUID,
    4: _NODEV,
    8: _NOEXEC,
    1024: _NOATIME,
    2048: _NODIRATIME,
    4096: _RELATIME,
}  # statvfs
_PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP = 1, 38, 22
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE3 = 435
# In turn: ptrace, mount, umount2, pivot_root, chroot, unshare, setns, bpf, perf_event_open, userfaultfd, keyctl,
# add_key, request_key, shmget, msgget, semget, mq_open, memfd_create, process_vm_readv, process_vm_writev,
# open_by_handle_at; and io_uring_setup, open_tree, move_mount, fsopen, memfd_secret, which have one number everywhere
_COMMON_SYSTEM_CALLS = (425, 428, 429, 430, 447)
_SYSTEM_CALLS = {  # machine -> audit architecture, clone, forbidden
    "x86_64": (0xC000003E, 56, (
        101, 165, 166, 155, 161, 272, 308, 321, 298, 323, 250, 248, 249, 29, 68, 64, 240, 319, 310, 311, 304,
        *_COMMON_SYSTEM_CALLS,
    )),
    "aarch64": (0xC00000B7, 220, (
        117, 40, 39, 41, 51, 97, 268, 280, 241, 282, 219, 217, 218, 194, 186, 190, 180, 279, 270, 271, 265,
        *_COMMON_SYSTEM_CALLS,
    )),
}  # fmt: skip
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

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Read what to run from stdin, run it locked in, and return its exit code."""
    spec = json.load(sys.stdin)
    _die_with_parent()
    _enter_namespaces()
    child = os.fork()
    if child == 0:
        try:
            _exec_program(spec)
        except OSError as error:
            print(f"jail: {error}", file=sys.stderr)
        os._exit(125)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) % 256


def _call_libc(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _die_with_parent() -> None:
    _call_libc("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _enter_namespaces() -> None:
    """Enter new namespaces.

    Root creates them directly where it may; other users create a user namespace first, in which they are mapped to
    nobody.
    """
    namespaces = sum(_NAMESPACE_FLAGS.values())
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _libc.unshare(namespaces) == 0:
        return
    _call_libc("unshare", namespaces | _CLONE_NEWUSER)  # also root of a container, who may not do the other
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _exec_program(spec: dict[str, Any]) -> None:
    _die_with_parent()
    _pivot_root(spec["root"], spec["interpreter"], spec["disk"])
    with open("/work/program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(spec["program"])
    os.chdir("/work")
    os.umask(0o077)
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _die_with_parent()  # a change of user has undone it
    for name, value in spec["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    _call_libc("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _forbid_system_calls()
    os.dup2(1, 3)
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    os.dup2(1, 0)
    os.write(3, b"locked in\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/work", "TMPDIR": "/work", "LANG": "C.UTF-8"}
    os.execve(spec["python"], [spec["python"], "-I", "-B", "/work/program.py"], environment)


def _pivot_root(root: str, interpreter: str, disk: int) -> None:
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes=4096,mode=755")
    os.umask(0o022)
    for path in dict.fromkeys((*_SYSTEM_PATHS, interpreter)):
        if os.path.exists(path) and not os.path.exists(root + path):
            _bind_mount(path, root + path)
    os.mkdir(root + "/work")
    os.chmod(root + "/work", 0o777)
    os.chdir(root)
    _call_libc("pivot_root", b".", b".")
    _call_libc("umount2", b".", _DETACH)
    os.chdir("/")


def _bind_mount(path: str, target: str) -> None:
    """Mount a path read-only at `target`; a symbolic link is copied."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        open(target, "w").close()
    _mount(path, target, None, _BIND | _REC)
    kept = sum(flag for bit, flag in _STATVFS_TO_MOUNT.items() if os.statvfs(target).f_flag & bit)
    device = path.startswith("/dev/")
    _mount(None, target, None, _BIND | _REMOUNT | _NOSUID | kept | (0 if device else _RDONLY | _NODEV))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call_libc("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _forbid_system_calls() -> None:
    """A seccomp filter: what no such program needs and what a kernel's holes were often found in fails with EPERM."""
    architecture, clone, forbidden = _SYSTEM_CALLS[platform.machine()]
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    rules += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x86's second table of system calls
    for number in forbidden:
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    rules += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]  # its flags are out of a filter's sight
    rules += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, sum(_NAMESPACE_FLAGS.values()) | _CLONE_NEWUSER),
    ]
    rules += [(_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    _call_libc("prctl", _SECCOMP, 2, program, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
