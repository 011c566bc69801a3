"""The system call filter: which calls a session may make, as data, and the assembler that turns it into classic BPF.

Two stages, because the supervisor must still build namespaces when the sessions no longer may:

- ``outer``: the supervisor installs it on itself as its first act, so it covers the whole sandbox. It allows what
  building a session takes (`SETUP`, and `clone` with namespace flags).
- ``inner``: each session installs it after its set-up and before any user code. It is the outer policy without that.

Filters stack, and the strictest answer wins; no process can take one off again.

The list is of what is denied, since arbitrary native wheels must run. Such a list rots when the kernel grows, so every
number that nobody has reviewed (above `NEWEST_REVIEWED`, or in a hole of the table) is answered ENOSYS: to the session
the kernel is as old as this file. ENOSYS is also the answer where a library then falls back to an older call that the
filter can judge; everything else that is denied gets an error that the C library reports as it is.

The filter sees registers, never the memory they point to. Every argument judged here is 32 bits wide or narrower in the
kernel, so only the low half of a register is compared: the kernel ignores the high half, and a rule that did not would
be walked around with one bit (CVE-2019-7303, CVE-2019-10063).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from .syscalls import MACHINES, NAMES, NEWEST_REVIEWED

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["POLICIES", "Clause", "Condition", "Policy", "Stage", "UnsupportedMachine", "install", "program"]

Stage = Literal["outer", "inner"]


class UnsupportedMachine(RuntimeError):
    """There is no system call table for this machine, so no filter can be made for it."""


# --- Vocabulary -------------------------------------------------------------------------------------------------------
# Linux's own numbers, written out: a program may be assembled on a system whose errno and socket modules say otherwise.

ALLOW = 0x7FFF_0000
KILL_PROCESS = 0x8000_0000
ERRNO = 0x0005_0000

EPERM, ENOSYS, EPROTONOSUPPORT, ESOCKTNOSUPPORT, EAFNOSUPPORT = 1, 38, 93, 94, 97

_WORD = 0xFFFF_FFFF


class Condition(NamedTuple):
    """A question about one argument: is `register & mask` one of `values` (or, if `among` is False, none of them)."""

    argument: int
    mask: int
    values: tuple[int, ...]
    among: bool


class Clause(NamedTuple):
    """`action` is the answer if every condition holds; without conditions it always is."""

    action: int
    conditions: tuple[Condition, ...]


Policy = Mapping[str, tuple[Clause, ...]]
"""By name of the call: the first clause that holds decides; without one that does, the call is allowed."""


def refuse(error: int, *conditions: Condition) -> Clause:
    """Answer `error` if all conditions hold."""
    return Clause(ERRNO | error, conditions)


def one_of(argument: int, *values: int, mask: int = _WORD) -> Condition:
    """The masked argument is one of the values."""
    return Condition(argument, mask, values, among=True)


def none_of(argument: int, *values: int, mask: int = _WORD) -> Condition:
    """The masked argument is none of the values."""
    return Condition(argument, mask, values, among=False)


def any_bit(argument: int, bits: int) -> Condition:
    """At least one of the bits is set in the argument."""
    return none_of(argument, 0, mask=bits)


# --- Policy -----------------------------------------------------------------------------------------------------------

ABSENT: Mapping[str, str] = {
    "flags lie in memory, out of the filter's sight; fall back to clone and openat": "clone3 openat2",
    "the newer mount API, which the older one's rules do not cover (CVE-2021-41133)": (
        "fsopen fsconfig fsmount fspick open_tree open_tree_attr move_mount mount_setattr"
    ),
}
"""Reason: calls answered ENOSYS at both stages."""

REFUSED: Mapping[str, str] = {
    "reach into other processes": (
        "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd"
    ),
    "enter or list namespaces and mounts": "setns listns statmount listmount setdomainname",
    "keyrings, which no namespace wholly divides": "add_key request_key keyctl",
    "large parts of the kernel with a long record of holes, which Python does not need": (
        "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register vmsplice"
    ),
    "memory that even the kernel cannot look into": "memfd_secret",
    "files by handle, past every path rule": "name_to_handle_at open_by_handle_at",
    "watch and veto the file accesses of others": "fanotify_init fanotify_mark",
    "place memory on nodes, where neighbours feel it": (
        "mbind move_pages migrate_pages set_mempolicy set_mempolicy_home_node"
    ),
    "security modules": "lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
    "the machine's clock": "settimeofday clock_settime clock_adjtime adjtimex",
    "run the machine": (
        "init_module finit_module delete_module create_module get_kernel_syms query_module kexec_load kexec_file_load "
        "reboot swapon swapoff acct quotactl quotactl_fd syslog vhangup"
    ),
    "x86 hardware": "iopl ioperm modify_ldt",
    "relics": "uselib ustat sysfs _sysctl lookup_dcookie nfsservctl",
}
"""Reason: calls answered EPERM at both stages."""

SETUP = "mount umount2 pivot_root chroot unshare sethostname"
"""Calls that building a session takes: allowed by the outer stage, answered EPERM by the inner one."""

UNBOUNDED: Mapping[str, str] = {
    "memory that no limit of ours sees: it is neither in a process nor below a folder of bounded size": (
        "memfd_create shmget shmat shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semtimedop semctl"
    ),
}
"""Reason: calls answered ENOSYS by the inner stage, as by a kernel that was built without them. /dev/shm stays."""

# CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}. CLONE_NEWTIME (0x80) is not among them: in clone() that bit belongs to the
# exit signal, and unshare(), where it counts, is refused whole.
_CLONE_NEW = 0x7E02_0000

_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423
_F_SETLEASE, _F_SETDELEG = 1024, 1040
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_TYPE_MASK, _SOCK_STREAM, _SOCK_DGRAM, _SOCK_RAW, _SOCK_PACKET = 0xF, 1, 2, 3, 10
_IPPROTO_DEFAULT, _IPPROTO_TCP, _IPPROTO_UDP = 0, 6, 17
_S_ISUID, _S_ISGID = 0o4000, 0o2000
_S_IFMT, _S_IFREG, _S_IFIFO = 0o170000, 0o100000, 0o010000
# The kernel's own __O_TMPFILE is the bit alone; the O_TMPFILE of C adds O_DIRECTORY, which differs between machines.
_O_CREAT, _O_TMPFILE_BIT = 0o100, 0o20000000

_INTERNET = one_of(0, _AF_INET, _AF_INET6)


def _no_set_id(mode: int, *conditions: Condition) -> Clause:
    # A bind-mounted folder is the host's: a set-id file made here could be run there.
    return refuse(EPERM, *conditions, any_bit(mode, _S_ISUID | _S_ISGID))


def _mode_of_new_file(flags: int, mode: int) -> tuple[Clause, ...]:
    # Unless a file is made, the kernel ignores the mode, and the C library leaves garbage in the register.
    return (_no_set_id(mode, any_bit(flags, _O_CREAT | _O_TMPFILE_BIT)),)


def _plain_nodes(mode: int) -> tuple[Clause, ...]:
    # mkfifo() is mknod(), so the call stays, but only for pipes and regular files (which type 0 also means).
    return (_no_set_id(mode), refuse(EPERM, none_of(mode, 0, _S_IFREG, _S_IFIFO, mask=_S_IFMT)))


BY_ARGUMENT: Policy = {
    # Typing into the terminal (TIOCSTI, TIOCLINUX) and loading line disciplines (TIOCSETD).
    "ioctl": (refuse(EPERM, one_of(1, _TIOCSTI, _TIOCLINUX, _TIOCSETD)),),
    # A lease or delegation on a file in the workspace would hold up the host that opens it, 45 s by default.
    "fcntl": (refuse(EPERM, one_of(1, _F_SETLEASE, _F_SETDELEG)),),
    # Families: AF_VSOCK ignores network namespaces before Linux 7.0, AF_ALG wrote to the page cache of read-only files
    # (CVE-2026-31431), the others are attack surface. Protocols: SCTP, SMC, UDP-Lite, L2TP and the like hide behind the
    # internet families and load kernel modules (by type too: DCCP, and SCTP as SOCK_SEQPACKET), so only TCP and UDP are
    # left, and the errors are those of a kernel without the others.
    "socket": (
        refuse(EAFNOSUPPORT, none_of(0, _AF_UNIX, _AF_INET, _AF_INET6)),
        refuse(EPERM, one_of(1, _SOCK_RAW, _SOCK_PACKET, mask=_SOCK_TYPE_MASK)),
        refuse(ESOCKTNOSUPPORT, _INTERNET, none_of(1, _SOCK_STREAM, _SOCK_DGRAM, mask=_SOCK_TYPE_MASK)),
        refuse(EPROTONOSUPPORT, _INTERNET, none_of(2, _IPPROTO_DEFAULT, _IPPROTO_TCP, _IPPROTO_UDP)),
    ),
    "socketpair": (refuse(EAFNOSUPPORT, none_of(0, _AF_UNIX)),),
    # 0 is what every process has, 0xFFFFFFFF asks; the rest turns off address randomisation and the like.
    "personality": (refuse(EPERM, none_of(0, 0, 0xFFFF_FFFF)),),
    "chmod": (_no_set_id(1),),
    "fchmod": (_no_set_id(1),),
    "fchmodat": (_no_set_id(2),),
    "fchmodat2": (_no_set_id(2),),
    "mkdir": (_no_set_id(1),),
    "mkdirat": (_no_set_id(2),),
    "creat": (_no_set_id(1),),
    "open": _mode_of_new_file(1, 2),
    "openat": _mode_of_new_file(2, 3),
    "mknod": _plain_nodes(1),
    "mknodat": _plain_nodes(2),
}


def _always(error: int, groups: Mapping[str, str]) -> Policy:
    return {name: (refuse(error),) for names in groups.values() for name in names.split()}


_OUTER: Policy = {**_always(ENOSYS, ABSENT), **_always(EPERM, REFUSED), **BY_ARGUMENT}

POLICIES: Mapping[Stage, Policy] = {
    "outer": _OUTER,
    "inner": {
        **_OUTER,
        **_always(ENOSYS, UNBOUNDED),
        **_always(EPERM, {"namespaces and mounts": SETUP}),
        "clone": (refuse(EPERM, any_bit(0, _CLONE_NEW)),),
    },
}


# --- Assembler --------------------------------------------------------------------------------------------------------

_LD, _AND, _JA, _JEQ, _JGE, _RET = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06  # linux/bpf_common.h
_NR, _ARCH, _ARGS = 0, 4, 16  # struct seccomp_data: offsets of the number, the machine and the first argument
_FAR = 255  # the longest conditional jump


class _Assembler:
    """Writes a program from its end to its start.

    Classic BPF only jumps forward, so written backwards every target stands before the jump to it is written, and its
    distance is known at once. An address is a position counted from the end; each method returns that of its block.
    """

    def __init__(self) -> None:
        self._code: list[bytes] = []  # the last instruction first

    def assembled(self) -> bytes:
        """The array of `struct sock_filter`, in the order of execution."""
        return b"".join(reversed(self._code))

    def ret(self, action: int) -> int:
        return self._emit(_RET, action)

    def step(self, code: int, operand: int) -> int:
        """An instruction that goes on at the one written just before it."""
        return self._emit(code, operand)

    def branch(self, code: int, operand: int, yes: int, no: int) -> int:
        """A conditional jump."""
        yes, no = self._near(yes), self._near(no)
        here = len(self._code)
        return self._emit(code, operand, here - 1 - yes, here - 1 - no)

    def clauses(self, clauses: Sequence[Clause], otherwise: int) -> int:
        """The first clause whose conditions all hold, else `otherwise`."""
        for clause in reversed(clauses):
            block = self.ret(clause.action)
            for condition in reversed(clause.conditions):
                block = self._condition(condition, block, otherwise)
            otherwise = block
        return otherwise

    def search(self, starts: Sequence[tuple[int, int]]) -> int:
        """Where to go for the number in the accumulator: `starts` are (first number of a range, address), ascending."""
        if len(starts) == 1:
            return starts[0][1]
        half = len(starts) // 2
        above = self.search(starts[half:])
        below = self.search(starts[:half])
        return self.branch(_JGE, starts[half][0], above, below)

    def _condition(self, condition: Condition, held: int, failed: int) -> int:
        hit, miss = (held, failed) if condition.among else (failed, held)
        for value in reversed(condition.values):
            miss = self.branch(_JEQ, value, hit, miss)
        if condition.mask != _WORD:
            self.step(_AND, condition.mask)
        return self.step(_LD, _ARGS + 8 * condition.argument)

    def _near(self, target: int) -> int:
        # One less than the reach, for the long jump that the other arm of the branch may still put in between.
        distance = len(self._code) - 1 - target
        return target if distance < _FAR else self._emit(_JA, distance)

    def _emit(self, code: int, operand: int, yes: int = 0, no: int = 0) -> int:
        self._code.append(struct.pack("<HBBI", code, yes, no, operand))
        return len(self._code) - 1


def program(stage: Stage, machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, fit for seccomp(2) and for bubblewrap's `--seccomp`.

    The same arguments always give the same bytes. `machine` is as in `os.uname().machine` and by default this one.

    A call that is always allowed passes a binary search over the numbers and reads no argument: so the kernel can tell
    in advance that the answer never varies (Linux 5.11 caches it per number) and does not run the filter for it.

    Raises:
        UnsupportedMachine: there is no system call table for the machine.
    """
    name = machine or os.uname().machine
    target = MACHINES.get(name)
    if target is None:
        raise UnsupportedMachine(f"seccomp: there is no filter for machine {name!r}, only for {', '.join(MACHINES)}")
    policy = POLICIES[stage]
    if unknown := policy.keys() - NAMES:
        raise RuntimeError(f"seccomp: the policy names calls that no machine has: {sorted(unknown)}")

    asm = _Assembler()
    allow, absent = asm.ret(ALLOW), asm.ret(ERRNO | ENOSYS)
    blocks: dict[tuple[Clause, ...], int] = {}  # calls with the same clauses share one block
    verdicts = {number: absent for hole in target.unassigned for number in hole}
    for call, clauses in policy.items():
        if call in target.numbers:
            if clauses not in blocks:
                blocks[clauses] = asm.clauses(clauses, allow)
            verdicts[target.numbers[call]] = blocks[clauses]

    starts = [(0, verdicts.get(0, allow))]
    for number in range(1, NEWEST_REVIEWED + 1):
        verdict = verdicts.get(number, allow)
        if verdict != starts[-1][1]:
            starts.append((number, verdict))
    # Unreviewed numbers, and with them all of x32, whose numbers are those of x86_64 with bit 30 set.
    starts.append((NEWEST_REVIEWED + 1, absent))

    asm.search(starts)
    entry = asm.step(_LD, _NR)
    # Another instruction set (`int 0x80` on x86_64) has other numbers: nothing in the table would mean what it says.
    asm.branch(_JEQ, target.audit_arch, entry, asm.ret(KILL_PROCESS))
    asm.step(_LD, _ARCH)
    return asm.assembled()


# --- Installation -----------------------------------------------------------------------------------------------------

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1


# Sessions are forks of a process that has assembled theirs.
assembled = functools.cache(program)


def install(stage: Stage) -> None:
    """Put the filter on this process, all its threads and all that they will ever start or become. It cannot be undone.

    Also sets no_new_privs, without which the kernel takes no filter from an unprivileged process.

    Raises:
        UnsupportedMachine: there is no filter for this machine, or the interpreter is a 32-bit one.
        OSError: the kernel refused, and the process goes on unfiltered: the caller must end it.
    """
    if sys.maxsize < 2**32:
        raise UnsupportedMachine("seccomp: there is no filter for a 32-bit Python")
    machine = os.uname().machine
    code = assembled(stage, machine)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        raise _failure(stage, ctypes.get_errno(), "no_new_privs was refused")
    filters = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog, with the compiler's padding between the two fields.
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(filters)))
    # TSYNC, since a preloaded library may have started a thread: all threads are covered, or none and it is an error.
    result = libc.syscall(
        ctypes.c_long(MACHINES[machine].numbers["seccomp"]),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        fprog,
    )
    if result < 0:
        raise _failure(stage, ctypes.get_errno(), "the kernel refused it")
    if result > 0:
        raise _failure(stage, errno.ESRCH, f"thread {result} could not be covered")


def _failure(stage: Stage, number: int, detail: str) -> OSError:
    return OSError(number, f"seccomp: the {stage} filter was not installed: {detail}: {os.strerror(number)}")
