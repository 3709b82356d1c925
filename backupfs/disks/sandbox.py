"""Limits for a process that reads what somebody hostile may have written: memory, time, files, no network, few calls.

The process keeps its descriptors for reading and for its line; it opens files to read only, makes no process and
no connection. What it is not allowed fails with EPERM, so that a library that tries something harmless goes on.
Source: seccomp(2), prctl(2), Linux's audit.h and the tables of system calls of its architectures.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable

MEMORY = 3 << 30
CPU_SECONDS = 3600

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_SECCOMP_MODE_FILTER = 2
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
_LOAD, _JUMP_EQUAL, _JUMP_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FLAGS_AT = 0, 4, 32  # of the call, in what the kernel shows of it

# openat, which may only read, first; then sendto and recvfrom, for connections that are open; then read, write, close,
# fstat, poll, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn, pread64, readv, writev,
# access, select, sched_yield, mremap, madvise, dup, nanosleep, getpid, exit, uname, fcntl, getcwd, readlink,
# gettimeofday, getrlimit, getuid, getgid, geteuid, getegid, sigaltstack, gettid, futex, getdents64, clock_gettime,
# clock_nanosleep, exit_group, newfstatat, readlinkat, faccessat, pselect6, ppoll, set_robust_list, preadv, preadv2,
# prlimit64, getrandom, statx, rseq, faccessat2, stat, lstat, time, sched_getaffinity: where a machine has them.
_CALLS = {
    "x86_64": (0xC000003E, (
        257, 44, 45, 0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 39, 60, 63,
        72, 79, 89, 96, 97, 102, 104, 107, 108, 131, 186, 202, 217, 228, 230, 231, 262, 267, 269, 270, 271, 273, 295,
        302, 318, 327, 332, 334, 439, 4, 6, 201, 204,
    )),
    "aarch64": (0xC00000B7, (
        56, 206, 207, 63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 65, 66, 48, 124, 216, 233, 23, 101,
        172, 93, 160, 25, 17, 78, 169, 163, 174, 175, 176, 177, 132, 178, 98, 61, 113, 115, 94, 79, 72, 73, 99, 69,
        261, 278, 286, 291, 293, 439, 123,
    )),
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def confine(kept: Iterable[int]) -> None:
    """Confine this process for good. Call it after everything was imported, with one thread.

    kept: descriptors above 2 that stay open.
    """
    keep = set(kept)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that the list was read through
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    _filter_calls()


def _filter_calls() -> None:
    """Let the kernel refuse calls that are not listed; on a machine whose table is not known here, none are."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return
    architecture, (opening, *calls) = known
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, _NUMBER_AT), (_JUMP_EQUAL, 0, 3, opening),
        (_LOAD, 0, 0, _FLAGS_AT), (_JUMP_ANY, len(calls) + 1, 0, _WRITING), (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    program += [(_JUMP_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header, len(header)), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "system calls cannot be filtered")
