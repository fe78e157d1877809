"""The seccomp filter for `jail.py`: it allows the system calls that CPython and its libraries make.

Everything else fails as on a kernel that doesn't have it, with ENOSYS, for which libraries have a way around. Left out
are, above all, calls that reach out of namespaces or count against the user (keys, message queues, watches), that in
the past were a kernel's holes (io_uring, bpf, splice, userfaultfd), and sockets. A lock on a file is granted without
being taken: one on a file of the machine would keep others outside waiting, and a filter can't tell files apart.
"""

import errno
import platform
import struct
from collections.abc import Sequence

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name, number on x86-64, number on aarch64
_ALLOWED = """
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
    open 2 -, creat 85 -, openat 257 56, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
    lseek 8 62, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, fsync 74 82,
    fdatasync 75 83, ftruncate 77 46, truncate 76 45, fallocate 285 47,
    stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -,
    faccessat 269 48, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, mkdir 83 -, mkdirat 258 34,
    rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -,
    linkat 265 37, symlink 88 -, symlinkat 266 36, mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52,
    fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
    utimensat 280 88, chdir 80 49, fchdir 81 50, getcwd 79 17, umask 95 166, getxattr 191 8,
    lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13,
    brk 12 214, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233,
    fork 57 -, vfork 58 -, execve 59 221, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, kill 62 129,
    tkill 200 130, tgkill 234 131, getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155,
    setpgid 109 154, getsid 124 156, setsid 112 157, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
    getgroups 115 158, getresuid 118 148, getresgid 120 150, arch_prctl 158 -, set_tid_address 218 96,
    set_robust_list 273 99, futex 202 98, rseq 334 293, membarrier 324 283,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133,
    rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128, alarm 37 -, pause 34 -, getitimer 36 102,
    setitimer 38 103,
    time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, nanosleep 35 101,
    clock_nanosleep 230 115, times 100 153, getrusage 98 165, getrlimit 97 163, setrlimit 160 164,
    getpriority 140 141, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, sysinfo 99 179, uname 63 160,
    getrandom 318 278,
    eventfd2 290 19, epoll_create1 291 20, epoll_create 213 -, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
    sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209, getsockname 51 204, getpeername 52 205
"""
_NAMESPACES = 0x7E020000  # CLONE_NEW...: mounts, cgroup, host name, IPC, users, processes, network
# name -> numbers of the call, index of the argument, its allowed values, and the error for others
_ALLOWED_ARGUMENTS = {
    "prlimit64": ((302, 261), 0, (0,), errno.EPERM),  # of itself
    "setpriority": ((141, 140), 0, (0,), errno.EPERM),  # PRIO_PROCESS
    "prctl": ((157, 167), 0, (15, 16), errno.EINVAL),  # PR_SET_NAME, PR_GET_NAME
    # F_DUPFD, F_{GET,SET}{FD,FL}, F_GETLK, F_OFD_GETLK, F_DUPFD_CLOEXEC
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 36, 1030), errno.EINVAL),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), errno.ENOTTY),
}
_CLONE, _SOCKET, _SOCKETPAIR, _FLOCK = (56, 220), (41, 198), (53, 199), (73, 32)
_LOCKS = {"fcntl": (6, 7, 37, 38)}  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPES = 1, 1, 0xF

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _MACHINE = 0, 4  # their offsets in the kernel's data
_Rule = tuple[int, int, int, int]
"""Operation, rules to skip if true, rules to skip if false, operand."""


def build_filter() -> bytes:
    """Build the filter for this machine, as an array of the kernel's `sock_filter`.

    Raises:
        NotImplementedError: a machine whose system calls aren't known here.
    """
    if platform.machine() not in _MACHINES:
        raise NotImplementedError(f"only {' and '.join(_MACHINES)} are supported, found {platform.machine()}")
    machine = list(_MACHINES).index(platform.machine())
    rules: list[_Rule] = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, _MACHINES[platform.machine()]), _refuse(None)]
    rules += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), _refuse(None)]  # the second table of x86
    for number in _list_allowed(machine):
        rules += _case(number, [])
    rules += [(_EQUAL, 0, 1, _FLOCK[machine]), _refuse(0)]
    for name, (numbers, index, values, error) in _ALLOWED_ARGUMENTS.items():
        locks = [rule for lock in _LOCKS.get(name, ()) for rule in ((_EQUAL, 0, 1, lock), _refuse(0))]
        rules += _case(numbers[machine], [_load_argument(index), *locks, *_one_of(index, values, error)])
    rules += _case(_CLONE[machine], [_load_argument(0), (_ANY_BIT, 0, 1, _NAMESPACES), _refuse(errno.EPERM)])
    unix_stream = _one_of(0, (_AF_UNIX,), errno.EAFNOSUPPORT)
    unix_stream += [_load_argument(1), (_AND, 0, 0, _SOCK_TYPES), (_EQUAL, 1, 0, _SOCK_STREAM)]
    rules += _case(_SOCKETPAIR[machine], [*unix_stream, _refuse(errno.EAFNOSUPPORT)])
    rules += [(_EQUAL, 0, 1, _SOCKET[machine]), _refuse(errno.EAFNOSUPPORT), _refuse(errno.ENOSYS)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _list_allowed(machine: int) -> list[int]:
    calls = [entry.split() for entry in _ALLOWED.split(",")]
    return [int(numbers[machine]) for _, *numbers in calls if numbers[machine] != "-"]


def _case(number: int, checks: Sequence[_Rule]) -> list[_Rule]:
    """Allow a system call if it passes the checks."""
    return [(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _ALLOW)]


def _one_of(index: int, values: Sequence[int], error: int) -> list[_Rule]:
    """Refuse a call unless its argument is one of the values. The upper half isn't checked: all of them are ints."""
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_load_argument(index), *tests, _refuse(error)]


def _load_argument(index: int) -> _Rule:
    return (_LOAD, 0, 0, 16 + 8 * index)


def _refuse(error: int | None) -> _Rule:
    """Make the call fail with an error. With 0 it succeeds without doing anything; None kills the process."""
    return (_RETURN, 0, 0, _KILL if error is None else _ERRNO | error)
