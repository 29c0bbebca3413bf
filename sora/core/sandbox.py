"""A process that has all it needs gives up the rest of its rights: `confine()`.

Afterwards it reads and writes the descriptors that it holds, receives further ones over a socket that it holds, uses
its memory and starts threads. Whatever else it asks of the kernel is refused with EPERM: to open, create, rename or
remove a file, to connect or listen, to start a program or a process, to signal or look into another one. Nothing of
this can be undone, and it needs no root.

Two Linux mechanisms do this, each as far as it goes. A seccomp filter (3.17, here for x86_64 and aarch64)
allows only the system calls below. Landlock (5.13) denies every file, from ABI 4 on also TCP, from ABI 6
on also signals and abstract sockets. If one of them is missing, `confine` reports it and continues with the other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

OPEN_FILES = 64

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38

# Landlock: linux/landlock.h. The system calls have these numbers on every architecture.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_VERSION = 1
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract sockets, signals

# seccomp: linux/seccomp.h, linux/filter.h.
_SET_MODE_FILTER, _GET_ACTION_AVAILABLE = 1, 2
_ALL_THREADS = 1
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # words of `struct seccomp_data`
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # where they lie in it
_CLONE_THREAD = 0x10000
_PROT_EXEC = 4


@dataclass(frozen=True, slots=True)
class _Machine:
    """An architecture's name to the kernel (AUDIT_ARCH_*) and the numbers of its system calls."""

    audit: int
    seccomp: int
    free: tuple[int, ...]  # allowed whatever their arguments are; the usual ones first
    mapping: tuple[int, ...]  # allowed if their third argument does not ask for executable memory
    clone: int
    tgkill: int
    prlimit: int


_CLONE3 = 435
_MACHINES = {
    "x86_64": _Machine(
        audit=0xC000003E,
        seccomp=317,
        # read, write, lseek, futex, pread64, munmap, brk, madvise, mremap, clock_gettime, gettimeofday, close, fstat,
        # recvmsg, recvfrom, readv, writev, poll, ppoll, select, rt_sigaction, rt_sigprocmask, rt_sigreturn,
        # sigaltstack, sched_yield, nanosleep, clock_nanosleep, clock_getres, getpid, gettid, getppid, getuid, geteuid,
        # getgid, getegid, getrandom, getrlimit, getrusage, times, sysinfo, uname, sched_getaffinity, getcpu,
        # set_robust_list, set_tid_address, rseq, membarrier, restart_syscall, exit, exit_group
        free=(
            *(0, 1, 8, 202, 17, 11, 12, 28, 25, 228, 96, 3, 5, 47, 45, 19, 20, 7, 271, 23, 13, 14, 15, 131, 24, 35),
            *(230, 229, 39, 186, 110, 102, 107, 104, 108, 318, 97, 98, 100, 99, 63, 204, 309, 273, 218, 334, 324, 219),
            *(60, 231),
        ),
        mapping=(9, 10),  # mmap, mprotect
        clone=56,
        tgkill=234,
        prlimit=302,
    ),
    "aarch64": _Machine(
        audit=0xC00000B7,
        seccomp=277,
        # The same, with pselect6 for select, and without poll and what else this architecture never had.
        free=(
            *(63, 64, 62, 98, 67, 215, 214, 233, 216, 113, 169, 57, 80, 212, 207, 65, 66, 73, 72, 134, 135, 139, 132),
            *(124, 101, 115, 114, 172, 178, 173, 174, 175, 176, 177, 278, 163, 165, 153, 179, 160, 123, 168, 99, 96),
            *(293, 283, 128, 93, 94),
        ),
        mapping=(222, 226),
        clone=220,
        tgkill=131,
        prlimit=261,
    ),
}


def hide_memory() -> None:
    """Keeps other processes of this user out of this one: no access to its memory or environment, no core dumps.

    Root's other processes still see everything of a process that root runs. What it starts by exec is not covered.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit(memory: int) -> None:
    """Hard limits, on every system: `memory` bytes of address space, few open files, no writing, no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if sys.platform == "linux":
        # If memory runs out, this process should be killed before the one that it works for.
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")


def confine() -> tuple[str, ...]:
    """Gives up every right but those above, for all threads. Import everything first: afterwards no file can be opened.

    Returns:
        What this kernel could not forbid, in words; empty if it forbids all of it.
    """
    if sys.platform != "linux":
        return lacking()
    libc = _libc()
    missing: list[str] = []
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return (f"no_new_privs ({_reason()})",)
    abi = _landlock_abi(libc)
    missing += _missing_of_landlock(abi)
    if abi:
        ruleset = _ruleset(abi)
        descriptor = libc.syscall(_CREATE_RULESET, ruleset, len(ruleset), 0)
        if descriptor < 0 or libc.syscall(_RESTRICT_SELF, descriptor, 0):
            missing.append(f"Landlock ({_reason()})")
        if descriptor >= 0:
            os.close(descriptor)
    machine = _MACHINES.get(platform.machine())
    if machine is None or not _has_seccomp(libc, machine):
        return (*missing, _no_seccomp())
    program = _program(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    pointed = _Program(len(program), ctypes.addressof(code))
    if libc.syscall(machine.seccomp, _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(pointed)):
        missing.append(f"seccomp ({_reason()})")
    return tuple(missing)


def lacking() -> tuple[str, ...]:
    """What `confine` could not forbid on this machine, in words; empty if it could forbid all."""
    if sys.platform != "linux":
        return ("Landlock and seccomp (this is not Linux)",)
    libc = _libc()
    machine = _MACHINES.get(platform.machine())
    seccomp = machine is not None and _has_seccomp(libc, machine)
    return (*_missing_of_landlock(_landlock_abi(libc)), *(() if seccomp else (_no_seccomp(),)))


def described() -> str:
    """The available mechanisms."""
    if sys.platform != "linux":
        return "none"
    libc = _libc()
    machine = _MACHINES.get(platform.machine())
    parts = [f"Landlock ABI {abi}"] if (abi := _landlock_abi(libc)) else []
    return " and ".join([*parts, "seccomp"] if machine is not None and _has_seccomp(libc, machine) else parts) or "none"


# --- Landlock -------------------------------------------------------------------------------------------------------


def _landlock_abi(libc: ctypes.CDLL) -> int:
    """Landlock's ABI; 0 if the kernel has none or it is switched off."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, _VERSION)))


def _missing_of_landlock(abi: int) -> list[str]:
    if not abi:
        return ["Landlock (Linux 5.13 or later has it, where `landlock` is among the boot parameter lsm=)"]
    parts = [name for name, since in (("TCP", 4), ("signals", 6)) if abi < since]
    return [f"Landlock's rules about {' and '.join(parts)} (its ABI is {abi} here)"] if parts else []


def _ruleset(abi: int) -> bytes:
    """`struct landlock_ruleset_attr` that handles all that this ABI can, and so denies it: no rule allows anything."""
    files = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)  # rights, a bit each: refer, truncate and ioctl came later
    words = [(1 << files) - 1]
    if abi >= 4:
        words.append(_TCP)
    if abi >= 6:
        words.append(_SCOPES)
    return struct.pack(f"={len(words)}Q", *words)


# --- seccomp --------------------------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _has_seccomp(libc: ctypes.CDLL, machine: _Machine) -> bool:
    action = ctypes.c_uint32(_ERRNO)
    return bool(libc.syscall(machine.seccomp, _GET_ACTION_AVAILABLE, 0, ctypes.byref(action)) == 0)


def _no_seccomp() -> str:
    return f"seccomp (this kernel has no filters, or Sora has none for {platform.machine()})"


def _program(machine: _Machine, own: int) -> list[tuple[int, int, int, int]]:
    """The filter: (code, jump if true, jump if false, operand) of each instruction. Jumps count from the next one."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)

    def load(place: int) -> tuple[int, int, int, int]:
        return _LOAD, 0, 0, place

    def argument(number: int, high: bool = False) -> tuple[int, int, int, int]:
        return load(_ARGUMENTS + 8 * number + 4 * high)  # both architectures are little-endian

    def when(call: int, *then: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        """`then`, which returns, if the call is this one. Afterwards its number is in the accumulator again."""
        return [(_EQUAL, 0, len(then), call), *then]

    code = [load(_ARCHITECTURE), (_EQUAL, 1, 0, machine.audit), refuse, load(_NUMBER)]
    for call in machine.free:
        code += when(call, allow)
    for call in machine.mapping:
        code += when(call, argument(2), (_ANY_BIT, 0, 1, _PROT_EXEC), refuse, allow)
    code += when(machine.clone, argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, refuse)
    # Its flags are in memory, which a filter can't read; if the call does not exist, libc uses clone.
    code += when(_CLONE3, (_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    code += when(  # abort() signals its own thread
        machine.tgkill,
        *(argument(0), (_EQUAL, 0, 3, own), argument(0, high=True), (_EQUAL, 0, 1, 0), allow, refuse),
    )
    code += when(machine.prlimit, argument(0), (_EQUAL, 0, 1, 0), allow, refuse)  # of itself
    return [*code, refuse]


# --- both -----------------------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
