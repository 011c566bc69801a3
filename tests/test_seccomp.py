"""The system call filter: its table against an independent one, its program on a small machine, and the real kernel.

Run as a script (see `in_child`), this file is also the process that puts the filter on itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import pty
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actbox.guest import seccomp, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from actbox.guest.seccomp import Stage

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
STAGES: tuple[Stage, ...] = ("outer", "inner")
MACHINE_AND_STAGE: list[tuple[str, Stage]] = [(machine, stage) for machine in ARCH for stage in STAGES]
X32 = 0x40000000

ANSWERS = {
    "ok": 0x7FFF0000,
    "kill": 0x80000000,
    "EPERM": 0x00050001,
    "ENOSYS": 0x00050026,
    "EPROTONOSUPPORT": 0x0005005D,
    "ESOCKTNOSUPPORT": 0x0005005E,
    "EAFNOSUPPORT": 0x00050061,
}
ANSWER_NAMES = {value: name for name, value in ANSWERS.items()}

# Written by hand from the kernel's tables and the containment document, not from the code. The answers are those to a
# call whose arguments are all zero; what depends on arguments is in CASES.
EXPECTED = """
    name                     x86_64  aarch64  outer         inner
    clone3                   435     435      ENOSYS        ENOSYS
    openat2                  437     437      ENOSYS        ENOSYS
    open_tree                428     428      ENOSYS        ENOSYS
    open_tree_attr           467     467      ENOSYS        ENOSYS
    move_mount               429     429      ENOSYS        ENOSYS
    fsopen                   430     430      ENOSYS        ENOSYS
    fsconfig                 431     431      ENOSYS        ENOSYS
    fsmount                  432     432      ENOSYS        ENOSYS
    fspick                   433     433      ENOSYS        ENOSYS
    mount_setattr            442     442      ENOSYS        ENOSYS
    mount                    165     40       ok            EPERM
    umount2                  166     39       ok            EPERM
    pivot_root               155     41       ok            EPERM
    chroot                   161     51       ok            EPERM
    unshare                  272     97       ok            EPERM
    sethostname              170     161      ok            EPERM
    ptrace                   101     117      EPERM         EPERM
    process_vm_readv         310     270      EPERM         EPERM
    process_vm_writev        311     271      EPERM         EPERM
    process_madvise          440     440      EPERM         EPERM
    process_mrelease         448     448      EPERM         EPERM
    kcmp                     312     272      EPERM         EPERM
    pidfd_getfd              438     438      EPERM         EPERM
    setns                    308     268      EPERM         EPERM
    statmount                457     457      EPERM         EPERM
    listmount                458     458      EPERM         EPERM
    listns                   470     470      EPERM         EPERM
    setdomainname            171     162      EPERM         EPERM
    add_key                  248     217      EPERM         EPERM
    request_key              249     218      EPERM         EPERM
    keyctl                   250     219      EPERM         EPERM
    bpf                      321     280      EPERM         EPERM
    perf_event_open          298     241      EPERM         EPERM
    userfaultfd              323     282      EPERM         EPERM
    io_uring_setup           425     425      EPERM         EPERM
    io_uring_enter           426     426      EPERM         EPERM
    io_uring_register        427     427      EPERM         EPERM
    vmsplice                 278     75       EPERM         EPERM
    memfd_secret             447     447      EPERM         EPERM
    name_to_handle_at        303     264      EPERM         EPERM
    open_by_handle_at        304     265      EPERM         EPERM
    fanotify_init            300     262      EPERM         EPERM
    fanotify_mark            301     263      EPERM         EPERM
    mbind                    237     235      EPERM         EPERM
    set_mempolicy            238     237      EPERM         EPERM
    set_mempolicy_home_node  450     450      EPERM         EPERM
    migrate_pages            256     238      EPERM         EPERM
    move_pages               279     239      EPERM         EPERM
    lsm_get_self_attr        459     459      EPERM         EPERM
    lsm_set_self_attr        460     460      EPERM         EPERM
    lsm_list_modules         461     461      EPERM         EPERM
    settimeofday             164     170      EPERM         EPERM
    clock_settime            227     112      EPERM         EPERM
    clock_adjtime            305     266      EPERM         EPERM
    adjtimex                 159     171      EPERM         EPERM
    init_module              175     105      EPERM         EPERM
    finit_module             313     273      EPERM         EPERM
    delete_module            176     106      EPERM         EPERM
    create_module            174     -        EPERM         EPERM
    get_kernel_syms          177     -        EPERM         EPERM
    query_module             178     -        EPERM         EPERM
    kexec_load               246     104      EPERM         EPERM
    kexec_file_load          320     294      EPERM         EPERM
    reboot                   169     142      EPERM         EPERM
    swapon                   167     224      EPERM         EPERM
    swapoff                  168     225      EPERM         EPERM
    acct                     163     89       EPERM         EPERM
    quotactl                 179     60       EPERM         EPERM
    quotactl_fd              443     443      EPERM         EPERM
    syslog                   103     116      EPERM         EPERM
    vhangup                  153     58       EPERM         EPERM
    iopl                     172     -        EPERM         EPERM
    ioperm                   173     -        EPERM         EPERM
    modify_ldt               154     -        EPERM         EPERM
    uselib                   134     -        EPERM         EPERM
    ustat                    136     -        EPERM         EPERM
    sysfs                    139     -        EPERM         EPERM
    _sysctl                  156     -        EPERM         EPERM
    lookup_dcookie           212     18       EPERM         EPERM
    nfsservctl               180     42       EPERM         EPERM
    socket                   41      198      EAFNOSUPPORT  EAFNOSUPPORT
    socketpair               53      199      EAFNOSUPPORT  EAFNOSUPPORT
    clone                    56      220      ok            ok
    ioctl                    16      29       ok            ok
    fcntl                    72      25       ok            ok
    personality              135     92       ok            ok
    open                     2       -        ok            ok
    openat                   257     56       ok            ok
    creat                    85      -        ok            ok
    chmod                    90      -        ok            ok
    fchmod                   91      52       ok            ok
    fchmodat                 268     53       ok            ok
    fchmodat2                452     452      ok            ok
    mkdir                    83      -        ok            ok
    mkdirat                  258     34       ok            ok
    mknod                    133     -        ok            ok
    mknodat                  259     33       ok            ok
    seccomp                  317     277      ok            ok
    prctl                    157     167      ok            ok
    prlimit64                302     261      ok            ok
    kill                     62      129      ok            ok
    fork                     57      -        ok            ok
    vfork                    58      -        ok            ok
    execve                   59      221      ok            ok
    execveat                 322     281      ok            ok
    memfd_create             319     279      ok            ENOSYS
    shmget                   29      194      ok            ENOSYS
    shmat                    30      196      ok            ENOSYS
    shmctl                   31      195      ok            ENOSYS
    shmdt                    67      197      ok            ENOSYS
    msgget                   68      186      ok            ENOSYS
    msgsnd                   69      189      ok            ENOSYS
    msgrcv                   70      188      ok            ENOSYS
    msgctl                   71      187      ok            ENOSYS
    semget                   64      190      ok            ENOSYS
    semop                    65      193      ok            ENOSYS
    semtimedop               220     192      ok            ENOSYS
    semctl                   66      191      ok            ENOSYS
    get_mempolicy            239     236      ok            ok
    pidfd_open               434     434      ok            ok
    pidfd_send_signal        424     424      ok            ok
    rseq                     334     293      ok            ok
    landlock_create_ruleset  444     444      ok            ok
    landlock_add_rule        445     445      ok            ok
    landlock_restrict_self   446     446      ok            ok
    futex_waitv              449     449      ok            ok
    cachestat                451     451      ok            ok
    rseq_slice_yield         471     471      ok            ok
"""
# Numbers that belong to no call, besides everything above the last row.
HOLES = {"x86_64": [*range(337, 424)], "aarch64": [*range(244, 260), *range(295, 424)]}
NEWEST = 471


class Row(NamedTuple):
    numbers: dict[str, int]  # by machine
    answers: dict[str, str]  # by stage


def read_expected() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for line in EXPECTED.strip().splitlines()[1:]:
        name, x86_64, aarch64, outer, inner = line.split()
        numbers = {"x86_64": x86_64, "aarch64": aarch64}
        rows[name] = Row({m: int(n) for m, n in numbers.items() if n != "-"}, {"outer": outer, "inner": inner})
    return rows


ROWS = read_expected()

CREATE, TMPFILE = 0o100, 0o20000000
HIGH = 1 << 32
# call, arguments, answer at the outer stage, answer at the inner stage
CASES: list[tuple[str, tuple[int, ...], str, str]] = [
    ("clone", (0x01200011,), "ok", "ok"),  # fork: CHILD_SETTID | CHILD_CLEARTID | SIGCHLD
    ("clone", (0x003D0F00,), "ok", "ok"),  # a thread
    ("clone", (0x00004111,), "ok", "ok"),  # vfork
    ("clone", (0x91,), "ok", "ok"),  # the bit of CLONE_NEWTIME is part of the exit signal here
    *[("clone", (flag | 17,), "ok", "EPERM") for flag in (0x20000, *(1 << bit for bit in range(25, 31)))],
    ("unshare", (0x80,), "ok", "EPERM"),
    ("ioctl", (0, 0x5412), "EPERM", "EPERM"),
    ("ioctl", (0, 0x5412 | HIGH), "EPERM", "EPERM"),
    ("ioctl", (0, 0x541C), "EPERM", "EPERM"),
    ("ioctl", (0, 0x541C | 1 << 63), "EPERM", "EPERM"),
    ("ioctl", (0, 0x5423), "EPERM", "EPERM"),
    ("ioctl", (0x5412, 0x5413), "ok", "ok"),
    ("ioctl", (0, 0x15412), "ok", "ok"),
    ("ioctl", (0, 0x80005412), "ok", "ok"),
    ("fcntl", (3, 1024), "EPERM", "EPERM"),
    ("fcntl", (3, 1040 | HIGH), "EPERM", "EPERM"),
    ("fcntl", (3, 1030), "ok", "ok"),  # F_DUPFD_CLOEXEC
    ("fcntl", (3, 0x80000400), "ok", "ok"),
    ("socket", (0x80000001, 1), "EAFNOSUPPORT", "EAFNOSUPPORT"),
    ("socket", (2, 1, 0x80000006), "EPROTONOSUPPORT", "EPROTONOSUPPORT"),
    ("socketpair", (1, 1), "ok", "ok"),
    ("socketpair", (2, 1), "EAFNOSUPPORT", "EAFNOSUPPORT"),
    ("socketpair", (0x80000001, 1), "EAFNOSUPPORT", "EAFNOSUPPORT"),
    ("personality", (0xFFFFFFFF,), "ok", "ok"),
    ("personality", (0xFFFFFFFFFFFFFFFF,), "ok", "ok"),
    ("personality", (0x0040000,), "EPERM", "EPERM"),  # ADDR_NO_RANDOMIZE
    ("personality", (8,), "EPERM", "EPERM"),
    *[(call, (0, 0o1777), "ok", "ok") for call in ("chmod", "fchmod", "mkdir", "creat")],
    *[(call, (0, 0o4755), "EPERM", "EPERM") for call in ("chmod", "fchmod", "mkdir", "creat")],
    *[(call, (0, 0o2755 | HIGH), "EPERM", "EPERM") for call in ("chmod", "fchmod", "mkdir", "creat")],
    *[(call, (0o6000, 0o6000, 0o1777), "ok", "ok") for call in ("fchmodat", "fchmodat2", "mkdirat")],
    *[(call, (0, 0, 0o4000), "EPERM", "EPERM") for call in ("fchmodat", "fchmodat2", "mkdirat")],
    *[(call, (0, 0, 0o2000), "EPERM", "EPERM") for call in ("fchmodat", "fchmodat2", "mkdirat")],
    ("mknod", (0, 0o644), "ok", "ok"),
    ("mknod", (0, 0o100644), "ok", "ok"),
    ("mknod", (0, 0o010644), "ok", "ok"),
    ("mknod", (0, 0o140644), "EPERM", "EPERM"),
    ("mknod", (0, 0o020644), "EPERM", "EPERM"),
    ("mknod", (0, 0o060644), "EPERM", "EPERM"),
    ("mknod", (0, 0o110644), "EPERM", "EPERM"),
    ("mknod", (0, 0o014755), "EPERM", "EPERM"),
    ("mknodat", (0, 0, 0o010644), "ok", "ok"),
    ("mknodat", (0, 0, 0o020644), "EPERM", "EPERM"),
    ("mknodat", (0, 0, 0o110644), "EPERM", "EPERM"),
    ("mknodat", (0, 0, 0o012644), "EPERM", "EPERM"),
    ("mknodat", (0, 0, 0o014644), "EPERM", "EPERM"),
    ("mknodat", (0o020000, 0o020000, 0o100600), "ok", "ok"),
]


# --- The small machine ------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    answer: str
    steps: int
    loads: set[int]  # offsets into struct seccomp_data


def simulate(program: bytes, machine: str, number: int, args: Iterable[int] = (), arch: int | None = None) -> Run:
    """Interpret the program as the kernel would; fails on everything that the kernel's checker refuses."""
    registers = [*args, *[0] * 6][:6]
    data = struct.pack("<IIQ6Q", number, ARCH[machine] if arch is None else arch, 0, *registers)
    position, accumulator, loads = 0, 0, set[int]()
    for steps in range(1, len(program) // 8 + 1):
        code, yes, no, operand = struct.unpack_from("<HBBI", program, position * 8)
        position += 1
        if code == 0x20:  # load a word
            assert operand % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, operand)
            loads.add(operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            position += operand
        elif code == 0x15:
            position += yes if accumulator == operand else no
        elif code == 0x35:
            position += yes if accumulator >= operand else no
        elif code == 0x25:  # not ours; libseccomp's search trees have it
            position += yes if accumulator > operand else no
        elif code == 0x06:
            return Run(ANSWER_NAMES.get(operand, hex(operand)), steps, loads)
        else:
            pytest.fail(f"unknown instruction {code:#x}")
    pytest.fail("the program ran past its length")


def answer(machine: str, stage: Stage, call: str, *args: int) -> str:
    return simulate(PROGRAMS[machine, stage], machine, ROWS[call].numbers[machine], args).answer


PROGRAMS: dict[tuple[str, Stage], bytes] = {
    (machine, stage): seccomp.program(stage, machine) for machine in ARCH for stage in STAGES
}


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_every_number_gets_the_expected_answer(machine: str, stage: Stage) -> None:
    """H5."""
    expected = dict.fromkeys(range(NEWEST + 1), "ok")
    expected.update(dict.fromkeys(HOLES[machine], "ENOSYS"))
    expected.update({row.numbers[machine]: row.answers[stage] for row in ROWS.values() if machine in row.numbers})
    unreviewed = [*range(NEWEST + 1, 601), *range(X32, X32 + 601), 2**31 - 1, 2**31, 2**32 - 1]
    expected.update(dict.fromkeys(unreviewed, "ENOSYS"))

    answers = {number: simulate(PROGRAMS[machine, stage], machine, number).answer for number in expected}

    assert {n: (answers[n], expected[n]) for n in expected if answers[n] != expected[n]} == {}


@pytest.mark.parametrize(("call", "args", "outer", "inner"), CASES)
def test_arguments_decide(call: str, args: tuple[int, ...], outer: str, inner: str) -> None:
    """F3, H5."""
    for machine in ROWS[call].numbers:
        assert (answer(machine, "outer", call, *args), answer(machine, "inner", call, *args)) == (outer, inner)


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_only_unix_tcp_and_udp_sockets_exist(machine: str, stage: Stage) -> None:
    """C5, C6."""
    unix, internet = 1, (2, 10)
    protocols = (0, 1, 6, 17, 33, 58, 115, 132, 136, 255, 256, 262)
    allowed = {(unix, kind, protocol) for kind in range(16) if kind not in (3, 10) for protocol in protocols}
    allowed |= {(family, kind, protocol) for family in internet for kind in (1, 2) for protocol in (0, 6, 17)}
    flags = 0o2000000 | 0o4000 | HIGH  # SOCK_CLOEXEC, SOCK_NONBLOCK, and a bit that the kernel does not see

    found = {
        (family, kind, protocol)
        for family in range(50)
        for kind in range(16)
        for protocol in protocols
        if answer(machine, stage, "socket", family | HIGH, kind | flags, protocol | HIGH) == "ok"
    }

    assert found == allowed


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((40, 1, 0), "EAFNOSUPPORT"),  # AF_VSOCK
        ((38, 5, 0), "EAFNOSUPPORT"),  # AF_ALG
        ((16, 3, 0), "EAFNOSUPPORT"),  # AF_NETLINK
        ((2, 3, 1), "EPERM"),  # raw
        ((2, 10, 3), "EPERM"),  # AF_PACKET by its old name
        ((2, 5, 0), "ESOCKTNOSUPPORT"),  # SCTP, if its module is loaded
        ((2, 6, 0), "ESOCKTNOSUPPORT"),  # DCCP
        ((2, 1, 132), "EPROTONOSUPPORT"),  # SCTP
        ((2, 1, 256), "EPROTONOSUPPORT"),  # SMC
        ((2, 2, 1), "EPROTONOSUPPORT"),  # ping
    ],
)
def test_a_refused_socket_gets_the_error_of_a_kernel_without_it(args: tuple[int, ...], expected: str) -> None:
    assert {answer(machine, stage, "socket", *args) for machine, stage in MACHINE_AND_STAGE} == {expected}


@settings(deadline=None)  # the machine may be busy
@given(flags=st.integers(0, 2**64 - 1), mode=st.integers(0, 2**64 - 1))
def test_opening_is_refused_exactly_if_it_would_make_a_set_id_file(flags: int, mode: int) -> None:
    """A22."""
    expected = "EPERM" if flags & (CREATE | TMPFILE) and mode & 0o6000 else "ok"
    for machine, stage in MACHINE_AND_STAGE:
        assert answer(machine, stage, "openat", 0, 0, flags, mode) == expected
        if machine == "x86_64":
            assert answer(machine, stage, "open", 0, flags, mode) == expected


CALLS_WITH_ARGUMENTS = st.tuples(
    st.sampled_from(sorted(ROWS)),
    st.lists(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 64), st.sampled_from([0x5412, 1024])), max_size=6),
)


@settings(deadline=None)  # the machine may be busy
@given(CALLS_WITH_ARGUMENTS)
def test_the_high_half_of_an_argument_never_matters(call: tuple[str, list[int]]) -> None:
    """F2, H5."""
    name, args = call
    low = [value & 0xFFFFFFFF for value in args]
    for machine in ROWS[name].numbers:
        for stage in STAGES:
            assert answer(machine, stage, name, *args) == answer(machine, stage, name, *low)


@settings(deadline=None)  # the machine may be busy
@given(CALLS_WITH_ARGUMENTS)
def test_the_inner_stage_allows_nothing_that_the_outer_refuses(call: tuple[str, list[int]]) -> None:
    name, args = call
    for machine in ROWS[name].numbers:
        outer, inner = (answer(machine, stage, name, *args) for stage in STAGES)
        assert inner == outer or (outer, inner) in (("ok", "EPERM"), ("ok", "ENOSYS"))


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
@pytest.mark.parametrize("arch", [0x40000003, 0x40000028, 0xC00000F3, 0])  # i386, arm, riscv64, nothing
def test_a_foreign_instruction_set_kills(machine: str, stage: Stage, arch: int) -> None:
    """H6."""
    for number in (0, 1, 20, 600, X32):
        assert simulate(PROGRAMS[machine, stage], machine, number, arch=arch).answer == "kill"
    other = next(value for name, value in ARCH.items() if name != machine)
    assert simulate(PROGRAMS[machine, stage], machine, 0, arch=other).answer == "kill"


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_an_everyday_call_is_answered_in_few_steps_and_without_its_arguments(machine: str, stage: Stage) -> None:
    # Otherwise the kernel (5.11 and later) cannot remember that it is always allowed.
    everyday = {"x86_64": (0, 1, 3, 7, 9, 202, 230, 232), "aarch64": (22, 57, 63, 64, 98, 115, 222)}
    for number in everyday[machine]:
        run = simulate(PROGRAMS[machine, stage], machine, number)
        assert run.loads == {0, 4}
        assert run.steps <= 14


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_the_program_is_one_that_the_kernel_accepts_and_has_no_dead_code(machine: str, stage: Stage) -> None:
    check_structure(PROGRAMS[machine, stage])
    assert seccomp.program(stage, machine) == PROGRAMS[machine, stage]


def check_structure(program: bytes) -> None:
    assert len(program) % 8 == 0
    code = list(struct.iter_unpack("<HBBI", program))
    assert len(code) <= 4096
    reached = {0}
    for here, (operation, yes, no, operand) in enumerate(code):
        if here not in reached or operation == 0x06:
            continue
        jumps = {0x05: (operand,), 0x15: (yes, no), 0x35: (yes, no)}.get(operation, (0,))
        reached |= {here + 1 + jump for jump in jumps}
    assert reached == set(range(len(code)))


def test_a_policy_too_long_for_short_jumps_still_means_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {name: 100 + index for index, name in enumerate(sorted(syscalls.NAMES))}
    conditions = (seccomp.one_of(5, 7, 8, 9), seccomp.any_bit(4, 0x30))
    policy = {name: (seccomp.refuse(n, *conditions), seccomp.refuse(n + 1000)) for name, n in errors.items()}
    monkeypatch.setitem(seccomp.POLICIES, "outer", policy)  # pyright: ignore[reportArgumentType]
    for machine in ARCH:
        program = seccomp.program("outer", machine)
        check_structure(program)
        assert len(program) > 8 * 2 * 255
        for name, number in syscalls.MACHINES[machine].numbers.items():
            for fourth, fifth, extra in ((0x10, 8, 0), (0x40, 8, 1000), (0x10, 6, 1000)):
                args = (0, 0, 0, 0, fourth, fifth)
                assert simulate(program, machine, number, args).answer == hex(0x50000 + errors[name] + extra)
        assert simulate(program, machine, 5).answer == "ok"


def test_a_misspelled_name_in_the_policy_is_an_error_and_not_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seccomp.POLICIES, "inner", {"ptrase": ()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="ptrase"):
        seccomp.program("inner", "x86_64")


def test_an_unknown_machine_is_refused_by_name() -> None:
    with pytest.raises(seccomp.UnsupportedMachine, match=r"'riscv64'.*x86_64, aarch64"):
        seccomp.program("inner", "riscv64")


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_the_table_of_numbers_agrees_with_the_expectations() -> None:
    assert syscalls.NEWEST_REVIEWED == NEWEST
    assert ROWS.keys() >= syscalls.NAMES
    for machine, arch in ARCH.items():
        table = syscalls.MACHINES[machine]
        assert table.audit_arch == arch
        assert [number for hole in table.unassigned for number in hole] == HOLES[machine]
        expected = {name: row.numbers[machine] for name, row in ROWS.items() if machine in row.numbers}
        assert {name: number for name, number in expected.items() if name in syscalls.NAMES} == table.numbers


@pytest.mark.parametrize("machine", ARCH)
def test_the_numbers_agree_with_libseccomp(machine: str) -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"libseccomp is not installed: {exc}")
    resolve, name_of = library.seccomp_syscall_resolve_name_arch, library.seccomp_syscall_resolve_num_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    name_of.argtypes, name_of.restype = [ctypes.c_uint32, ctypes.c_int], ctypes.c_char_p

    found = {name: resolve(ARCH[machine], name.encode()) for name in ROWS}
    known = {name: number for name, number in found.items() if number != -1}  # -1: newer than the library
    present = {name: number for name, number in known.items() if number >= 0}  # below -1: not on this machine

    expected = {name: ROWS[name].numbers[machine] for name in known if machine in ROWS[name].numbers}
    assert present == expected
    assert all(number > 450 for name in found.keys() - known.keys() for number in ROWS[name].numbers.values())
    assert [number for number in HOLES[machine] if name_of(ARCH[machine], number) is not None] == []


# --- The real kernel --------------------------------------------------------------------------------------------------

HERE = os.uname().machine
live = pytest.mark.skipif(
    not sys.platform.startswith("linux") or HERE not in ARCH,
    reason="the filter is of Linux on x86_64 and aarch64",
)


def in_child(task: str, stages: Iterable[Stage], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one of TASKS in a fresh process that first installs the stages."""
    paths = (str(Path(seccomp.__file__).parents[2]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, __file__, task, *stages],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )


def report(task: str, stages: Iterable[Stage], folder: Path) -> dict[str, str]:
    process = in_child(task, stages, folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "ok"


def raw(call: str | int, *args: int | bytes) -> str:
    """A system call past the C library, which may have its own fallbacks."""
    number = call if isinstance(call, int) else ROWS[call].numbers[HERE]
    libc = ctypes.CDLL(None, use_errno=True)
    values = [ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value) for value in args]
    result = libc.syscall(ctypes.c_long(number), *values)
    return "ok" if result != -1 else errno.errorcode[ctypes.get_errno()]


def family(number: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> str:
    return attempt(lambda: socket.socket(number, kind, protocol).close())


MISSING = 0x0AC7B0E5  # a key of System V objects that nobody uses


def probe() -> dict[str, str]:
    """What the kernel says to the calls of the attack list."""
    own = Path("own")
    own.touch()
    descriptor = os.open(own, os.O_RDONLY)
    _, terminal = pty.openpty()
    new_user_and_shared_fs = 0x10000000 | 0x200  # contradictory, so no process comes of it without the filter either
    answers = {
        "ptrace": raw("ptrace", 0, 0, 0, 0),
        "process_vm_readv": raw("process_vm_readv", os.getpid(), 0, 0, 0, 0, 0),
        "kcmp": raw("kcmp", os.getpid(), os.getpid(), 1, 0, 0),
        "pidfd_open": raw("pidfd_open", os.getpid(), 0),
        "pidfd_getfd": raw("pidfd_getfd", 0, 0, 0),
        "keyctl": raw("keyctl", 0, 2**64 - 3, 0, 0, 0),
        "io_uring_setup": raw("io_uring_setup", 1, bytes(120)),
        "userfaultfd": raw("userfaultfd", 1),
        "bpf": raw("bpf", 0, 0, 0),
        "memfd_secret": raw("memfd_secret", 0),
        "memfd_create": raw("memfd_create", b"x", 0),
        # Of what is not there: what these make would outlive the process.
        "shmget": raw("shmget", MISSING, 1, 0),
        "msgget": raw("msgget", MISSING, 0),
        "semget": raw("semget", MISSING, 1, 0),
        "unshare": raw("unshare", 0),
        "setns": raw("setns", descriptor, 0),
        "clone with a namespace": raw("clone", new_user_and_shared_fs, 0, 0, 0, 0),
        "clone3": raw("clone3", 0, 0),
        "openat2": raw("openat2", 0, 0, 0, 0),
        "mount": raw("mount", b"none", b"missing", b"tmpfs", 0, 0),
        "chroot": raw("chroot", b"missing"),
        "fsopen": raw("fsopen", b"tmpfs", 0),
        "mount_setattr": raw("mount_setattr", 0, b"", 0, 0, 0),
        "number 600": raw(600),
        "personality asked": raw("personality", 0xFFFFFFFF),
        "personality changed": raw("personality", 0x0040000),
        "chmod 04755": attempt(lambda: own.chmod(0o4755)),
        "chmod 02755": attempt(lambda: own.chmod(0o2755)),
        "chmod 01755": attempt(lambda: own.chmod(0o1755)),
        "fchmod 04755": attempt(lambda: os.fchmod(descriptor, 0o4755)),
        "open 04755": attempt(lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o4755)),
        "open 0755": attempt(lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o755)),
        "open with a stray mode": raw("openat", 2**64 - 100, b"own", os.O_RDONLY, 0o7777),
        "mkdir 02755": attempt(lambda: os.mkdir("d", 0o2755)),  # noqa: PTH102 - the call itself is meant
        "mkdir 0755": attempt(lambda: os.mkdir("e", 0o755)),  # noqa: PTH102
        "mkfifo": attempt(lambda: os.mkfifo("pipe")),
        "mknod of a device": attempt(lambda: os.mknod("null", 0o020666, os.makedev(1, 3))),
        "lease": attempt(lambda: fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        "TIOCSTI": raw("ioctl", terminal, 0x5412, b"x"),
        "TIOCSTI with a high bit": raw("ioctl", terminal, 0x5412 | HIGH, b"x"),
        "TIOCSETD": raw("ioctl", terminal, 0x5423, bytes(4)),
        "TIOCGWINSZ": raw("ioctl", terminal, 0x5413, bytes(8)),
        "AF_UNIX": family(1),
        "AF_INET": family(2),
        "AF_INET datagram": family(2, socket.SOCK_DGRAM),
        "AF_NETLINK": family(16, socket.SOCK_RAW),
        "AF_PACKET": family(17, socket.SOCK_DGRAM),
        "AF_ALG": family(38, socket.SOCK_SEQPACKET),
        "AF_VSOCK": family(40),
        "raw": family(2, socket.SOCK_RAW, 1),
        "ping": family(2, socket.SOCK_DGRAM, 1),
        "SCTP": family(2, socket.SOCK_STREAM, 132),
        "socketpair": attempt(socket.socketpair),
        "socketpair of AF_INET": attempt(lambda: socket.socketpair(socket.AF_INET)),
    }
    if HERE == "x86_64":
        answers["x32"] = raw(X32 | 39)
    return answers


ALLOWED_EVERYWHERE = {
    *("pidfd_open", "personality asked", "chmod 01755", "open 0755", "open with a stray mode"),
    *("mkdir 0755", "mkfifo", "TIOCGWINSZ", "AF_UNIX", "AF_INET", "AF_INET datagram", "socketpair"),
}
OTHER_ERRORS = {
    **dict.fromkeys(("clone3", "openat2", "fsopen", "mount_setattr", "number 600", "x32"), "ENOSYS"),
    **dict.fromkeys(("memfd_create", "shmget", "msgget", "semget"), "ENOSYS"),
    **dict.fromkeys(("AF_NETLINK", "AF_PACKET", "AF_ALG", "AF_VSOCK", "socketpair of AF_INET"), "EAFNOSUPPORT"),
    **dict.fromkeys(("ping", "SCTP"), "EPROTONOSUPPORT"),
}


@live
def test_a_session_is_refused_the_attack_list_by_the_kernel(tmp_path: Path) -> None:
    """F1, F2, F3, H3, H4, H5, H6."""
    answers = report("probe", STAGES, tmp_path)
    expected = {name: "ok" if name in ALLOWED_EVERYWHERE else OTHER_ERRORS.get(name, "EPERM") for name in answers}
    assert answers == expected


@live
def test_the_supervisor_may_still_build_sessions(tmp_path: Path) -> None:
    inner, outer = report("probe", STAGES, fresh(tmp_path)), report("probe", STAGES[:1], fresh(tmp_path))
    # The kernel itself answers these: a folder that is missing, flags that contradict each other, nothing to unshare.
    built = {"mount": "ENOENT", "chroot": "ENOENT", "clone with a namespace": "EINVAL", "unshare": "ok"}
    # What no limit sees is refused to sessions alone: an engine's own tools come before them.
    unbounded = {"memfd_create": "ok", **dict.fromkeys(("shmget", "msgget", "semget"), "ENOENT")}
    assert outer == {**inner, **built, **unbounded}


@live
def test_without_the_filter_the_same_calls_succeed(tmp_path: Path) -> None:
    # The refusals above are thus the filter's, not the machine's. Only what any user on any machine may do is asked.
    """H14."""
    answers = report("probe", [], tmp_path)
    names = ("chmod 04755", "chmod 02755", "fchmod 04755", "open 04755", "mkdir 02755", "TIOCSETD")
    assert {name: answers[name] for name in names} == dict.fromkeys(names, "ok")


def fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines)


@live
def test_both_filters_and_no_new_privileges_are_on(tmp_path: Path) -> None:
    """H1."""
    found = report("status", STAGES, tmp_path)
    assert (found["NoNewPrivs"], found["Seccomp"], found.get("Seccomp_filters", "2")) == ("1", "2", "2")


def running_thread() -> dict[str, str]:
    go, answers = threading.Event(), dict[str, str]()

    def wait_and_try() -> None:
        assert go.wait(10)
        answers["chmod"] = attempt(lambda: Path.cwd().chmod(0o4755))

    thread = threading.Thread(target=wait_and_try)
    thread.start()
    seccomp.install("inner")
    go.set()
    thread.join(10)
    return answers


@live
def test_a_thread_that_already_runs_is_covered(tmp_path: Path) -> None:
    assert report("running_thread", [], tmp_path) == {"chmod": "EPERM"}


def refused_installation() -> dict[str, str]:
    def endless(stage: Stage, machine: str | None = None) -> bytes:
        return bytes(8)

    seccomp.assembled = endless  # the kernel refuses a program without an end
    try:
        seccomp.install("inner")
    except OSError as exc:
        return {"error": errno.errorcode[exc.errno or 0], "text": str(exc)}
    return {}


@live
def test_a_refused_installation_is_an_error_that_names_the_layer(tmp_path: Path) -> None:
    found = report("refused_installation", [], tmp_path)
    assert found["error"] == "EINVAL"
    assert "seccomp: the inner filter was not installed" in found["text"]


def call_i386() -> dict[str, str]:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000 cd80 c3"))  # mov eax, 20 (getpid); int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return {"pid": str(ctypes.CFUNCTYPE(ctypes.c_int)(address)())}


@live
@pytest.mark.skipif(HERE != "x86_64", reason="only x86_64 has a second instruction set to call through")
def test_a_call_through_the_i386_table_kills_the_process(tmp_path: Path) -> None:
    # SIGSEGV is what a kernel without 32-bit emulation sends before any filter is asked.
    """H6."""
    assert in_child("call_i386", STAGES, tmp_path).returncode in (-signal.SIGSYS, -signal.SIGSEGV)


# --- What must keep working -------------------------------------------------------------------------------------------


def use_threads() -> None:
    results: list[int] = []
    threads = [threading.Thread(target=results.append, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == [*range(8)]


def use_subprocess() -> None:
    assert subprocess.run(["/bin/sh", "-c", "echo $((6*7))"], capture_output=True, check=True).stdout == b"42\n"
    assert subprocess.run(["/bin/sh", "-c", "exit 3"], check=False, start_new_session=True).returncode == 3
    pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", "exit 4"], {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4


def use_multiprocessing_fork() -> None:
    use_multiprocessing("fork")


def use_multiprocessing_spawn() -> None:
    use_multiprocessing("spawn")


def use_multiprocessing(method: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(abs, [-1, -2, -3], timeout=10)) == [1, 2, 3]


def use_shared_memory() -> None:
    block = shared_memory.SharedMemory(create=True, size=4096)
    pid = os.fork()
    if pid == 0:
        block.buf[0] = 42  # pyright: ignore[reportOptionalSubscript]
        os._exit(0)
    os.waitpid(pid, 0)
    assert block.buf[0] == 42  # pyright: ignore[reportOptionalSubscript]
    block.close()
    block.unlink()


def use_sqlite() -> None:
    connection = sqlite3.connect("data.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (42)")
    connection.commit()
    assert connection.execute("SELECT x FROM t").fetchall() == [(42,)]
    connection.close()


def use_pty() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.write(1, b"hello")
        os._exit(0)
    assert os.read(terminal, 5) == b"hello"
    os.waitpid(pid, 0)


def use_asyncio_subprocess() -> None:
    async def main() -> bytes:
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=-1, stdout=-1)
        return (await asyncio.wait_for(process.communicate(b"hello"), 10))[0]

    assert asyncio.run(main()) == b"hello"


def use_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), 10)
        peer, _ = server.accept()
        client.sendall(b"hello")
        assert peer.recv(5, socket.MSG_WAITALL) == b"hello"
        client.close()
        peer.close()
    assert socket.getaddrinfo("localhost", 80)


def use_files() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = Path(folder, "source")
        source.write_text("hello", encoding="ascii")
        source.chmod(0o751)
        copy = Path(shutil.copy(source, Path(folder, "copy")))
        assert copy.stat().st_mode & 0o7777 == 0o751
        shutil.copytree(folder, "tree")
        shutil.move("tree", "moved")
        shutil.make_archive("archive", "gztar", "moved")
        shutil.unpack_archive("archive.tar.gz", "unpacked")
    with tempfile.TemporaryFile(dir=".") as unnamed, tempfile.NamedTemporaryFile(dir=".") as named:
        unnamed.write(b"x")
        fcntl.flock(named, fcntl.LOCK_EX)
        os.set_inheritable(named.fileno(), True)
    assert Path("unpacked/source").read_text(encoding="ascii") == "hello"


BENIGN: tuple[Callable[[], None], ...] = (
    use_threads,
    use_subprocess,
    use_multiprocessing_fork,
    use_multiprocessing_spawn,
    use_shared_memory,
    use_sqlite,
    use_pty,
    use_asyncio_subprocess,
    use_loopback,
    use_files,
)


@live
@pytest.mark.parametrize("task", [task.__name__ for task in BENIGN])
def test_ordinary_python_still_works_in_a_session(task: str, tmp_path: Path) -> None:
    """H11."""
    process = in_child(task, STAGES, tmp_path)
    assert process.returncode == 0, process.stderr


TASKS: dict[str, Callable[[], object]] = {
    task.__name__: task for task in (probe, status, running_thread, refused_installation, call_i386, *BENIGN)
}

if __name__ == "__main__":
    for requested in STAGES:
        if requested in sys.argv[2:]:
            seccomp.install(requested)
    print(json.dumps(TASKS[sys.argv[1]]()))  # noqa: T201 - this is the report
