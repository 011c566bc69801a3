"""The Docker profile: read as runc and libseccomp read it, it allows exactly what the policy's own filter allows."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attempts
import pytest
import test_seccomp
from call_numbers import CALLS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_seccomp import (
    ANSWERS,
    ARCH,
    HERE,
    HIGH,
    HOLES,
    MACHINE_AND_STAGE,
    NEWEST,
    PROGRAMS,
    ROWS,
    STAGES,
    X32,
    live,
    simulate,
)

from actbox.engines import profile
from actbox.engines.calls import UNMENTIONED
from actbox.guest import seccomp, syscalls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from actbox.guest.seccomp import Stage

PROFILES: dict[tuple[str, Stage], dict[str, Any]] = {
    (machine, stage): profile.docker_profile(stage, machine) for machine, stage in MACHINE_AND_STAGE
}
SCMP_ARCH = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
ERRNO_NAMES = {value & 0xFFFF: name for name, value in ANSWERS.items() if value & ~0xFFFF == 0x50000}


# --- The interpreter --------------------------------------------------------------------------------------------------


class Reading:
    """A profile as runc reads it with a libseccomp that knows the calls in `known`: what it answers to a call."""

    def __init__(self, profile: dict[str, Any], machine: str, known: Mapping[str, int]) -> None:
        assert profile["architectures"] == [SCMP_ARCH[machine]]
        self.machine = machine
        self.default = self._answer(profile["defaultAction"], profile["defaultErrnoRet"])
        self.rules: dict[int, list[tuple[str, list[dict[str, Any]]]]] = {}
        for rule in profile["syscalls"]:
            answer = self._answer(rule["action"], rule.get("errnoRet", 1))
            assert answer != self.default  # libseccomp refuses it
            for number in (known[name] for name in rule["names"] if name in known):
                self.rules.setdefault(number, []).append((answer, rule.get("args", [])))
        self.last = max(self.rules)

    def answer(self, number: int, args: Iterable[int] = ()) -> str:
        if self.machine == "x86_64" and number >= X32:
            return "kill"
        if number > self.last:
            return "ENOSYS"  # runc puts this before libseccomp's part, unless the default is to allow
        registers = [*args, *[0] * 6][:6]
        rules = self.rules.get(number, [])
        answers = {answer for answer, args in rules if not args}  # these replace the conditional ones
        answers = answers or {answer for answer, args in rules if all(holds(arg, registers) for arg in args)}
        assert len(answers) <= 1
        return answers.pop() if answers else self.default

    @staticmethod
    def _answer(action: str, error: int) -> str:
        return "ok" if action == "SCMP_ACT_ALLOW" else ERRNO_NAMES[error]


def holds(arg: dict[str, Any], registers: Sequence[int]) -> bool:
    assert arg["op"] == "SCMP_CMP_MASKED_EQ"
    index, mask, value = int(arg["index"]), int(arg["value"]), int(arg["valueTwo"])
    return registers[index] & mask == value


READINGS = {key: Reading(made, key[0], CALLS[key[0]]) for key, made in PROFILES.items()}


def filtered(machine: str, stage: Stage, number: int, args: Iterable[int] = ()) -> str:
    return simulate(PROGRAMS[machine, stage], machine, number, args).answer


# --- What to ask ------------------------------------------------------------------------------------------------------


def values_of(name: str, argument: int) -> set[int]:
    """What the policy compares this argument of the call with."""
    clauses = [clause for policy in seccomp.POLICIES.values() for clause in policy.get(name, ())]
    conditions = [condition for clause in clauses for condition in clause.conditions if condition.argument == argument]
    return {value for condition in conditions for value in (*condition.values, condition.mask)} | {0}


CONDITIONAL = sorted({name for name in ROWS if any(values_of(name, argument) != {0} for argument in range(6))})


def around(value: int) -> Iterator[int]:
    yield value
    yield from (value ^ 1 << bit for bit in range(64))


def near(name: str, argument: int) -> st.SearchStrategy[int]:
    value = st.sampled_from(sorted(values_of(name, argument)))
    bit = st.sampled_from([0, *(1 << bit for bit in range(64))])
    return st.one_of(value, st.builds(int.__xor__, value, bit), st.integers(0, 2**64 - 1))


def arguments_of(name: str) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
    return st.tuples(st.just(name), st.tuples(*(near(name, argument) for argument in range(6))))


QUESTIONS = st.sampled_from(CONDITIONAL).flatmap(arguments_of)
EVERY_NUMBER = [*range(NEWEST + 130), *range(X32, X32 + NEWEST + 130), 2**31 - 1, 2**31, 2**32 - 2]


def sweep(name: str) -> Iterator[list[int]]:
    """Every value that the policy compares with, of all arguments together, and in one of them one bit changed."""
    for values in itertools.product(*(sorted(values_of(name, argument)) for argument in range(4))):
        yield [*values]
        for argument in range(4):
            if values_of(name, argument) != {0}:
                for changed in around(values[argument]):
                    yield [*values[:argument], changed, *values[argument + 1 :]]


# --- Profile and policy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_every_number_gets_the_verdict_of_the_policy(machine: str, stage: Stage) -> None:
    """H5."""
    reading = READINGS[machine, stage]
    wrong: dict[int, tuple[str, str]] = {}
    for number in EVERY_NUMBER:
        found, expected = reading.answer(number), filtered(machine, stage, number)
        # The differences that the module's first lines own up to.
        if number in HOLES[machine] or expected.endswith("NOSUPPORT"):
            expected = "EPERM"
        elif machine == "x86_64" and number >= X32:
            expected = "kill"
        if found != expected:
            wrong[number] = (found, expected)
    assert wrong == {}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_arguments_get_the_verdict_of_the_policy(name: str) -> None:
    for machine, stage in MACHINE_AND_STAGE:
        if name not in CALLS[machine]:
            continue
        number, reading = CALLS[machine][name], READINGS[machine, stage]
        for args in sweep(name):
            expected = "ok" if filtered(machine, stage, number, args) == "ok" else "EPERM"
            assert reading.answer(number, args) == expected, (machine, stage, args)


@settings(deadline=None)  # the machine may be busy
@given(QUESTIONS)
def test_chosen_arguments_get_the_verdict_of_the_policy(question: tuple[str, tuple[int, ...]]) -> None:
    name, args = question
    for machine, stage in MACHINE_AND_STAGE:
        if name in CALLS[machine]:
            number = CALLS[machine][name]
            expected = "ok" if filtered(machine, stage, number, args) == "ok" else "EPERM"
            assert READINGS[machine, stage].answer(number, args) == expected


@pytest.mark.parametrize(("call", "args", "outer", "inner"), test_seccomp.CASES)
def test_the_cases_of_the_policy_hold(call: str, args: tuple[int, ...], outer: str, inner: str) -> None:
    for machine in ROWS[call].numbers:
        for stage, expected in zip(STAGES, (outer, inner), strict=True):
            found = READINGS[machine, stage].answer(ROWS[call].numbers[machine], args)
            assert found == ("ok" if expected == "ok" else "EPERM")


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
@pytest.mark.parametrize("newest", [424, 436, 439, 450, 456, 462])
def test_for_an_older_libseccomp_newer_calls_do_not_exist(machine: str, stage: Stage, newest: int) -> None:
    known = {name: number for name, number in CALLS[machine].items() if number <= newest}
    reading = Reading(PROFILES[machine, stage], machine, known)
    for number in range(NEWEST + 130):
        current = READINGS[machine, stage].answer(number)
        # A newest call that is denied is not named, so that "newer" begins with it.
        assert reading.answer(number) == current or (number >= reading.last and reading.answer(number) == "ENOSYS")
    assert newest - 6 <= reading.last <= newest


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_what_a_library_must_take_for_an_old_kernel_is_answered_so(machine: str, stage: Stage) -> None:
    absent = {name for name, row in ROWS.items() if row.answers[stage] == "ENOSYS"}
    assert {"clone3", "openat2"} <= absent
    assert {READINGS[machine, stage].answer(CALLS[machine][name]) for name in absent} == {"ENOSYS"}


# --- Its form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_a_rule_says_only_what_libseccomp_understands(machine: str, stage: Stage) -> None:
    for rule in PROFILES[machine, stage]["syscalls"]:
        assert set(rule) <= {"names", "action", "args", "errnoRet"}
        assert rule["names"] == sorted(set(rule["names"]))
        args = rule.get("args", [])
        assert len({arg["index"] for arg in args}) == len(args)  # else runc makes alternatives of them
        for arg in args:
            assert 0 < arg["value"] < HIGH  # a bit of the high half would be one to walk around the rule with
            assert arg["valueTwo"] & ~arg["value"] == 0  # else libseccomp drops bits of it


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_no_two_rules_of_a_call_overlap(machine: str, stage: Stage) -> None:
    for rules in READINGS[machine, stage].rules.values():
        for (_, one), (_, other) in itertools.combinations(rules, 2):
            pairs = [(a, b) for a in one for b in other if a["index"] == b["index"]]
            assert any((a["valueTwo"] ^ b["valueTwo"]) & a["value"] & b["value"] for a, b in pairs)


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_the_profile_is_plain_json_and_always_the_same(machine: str, stage: Stage) -> None:
    text = profile.to_json(PROFILES[machine, stage])
    assert json.loads(text) == PROFILES[machine, stage]
    assert profile.to_json(profile.docker_profile(stage, machine)) == text
    assert len(text) < 32_000


def test_an_unknown_machine_is_refused_by_name() -> None:
    with pytest.raises(seccomp.UnsupportedMachine, match=r"'riscv64'.*x86_64, aarch64"):
        profile.docker_profile("inner", "riscv64")


def test_a_misspelled_name_in_the_policy_is_an_error_and_not_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seccomp.POLICIES, "inner", {"ptrase": ()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="ptrase"):
        profile.docker_profile("inner", "x86_64")


@pytest.mark.parametrize("machine", ARCH)
def test_every_reviewed_call_has_a_name(machine: str) -> None:
    numbers = CALLS[machine]
    assert {*range(NEWEST + 1)} - {*numbers.values()} == {*HOLES[machine]}
    assert UNMENTIONED[machine].isdisjoint(syscalls.NAMES)
    assert UNMENTIONED[machine] | syscalls.MACHINES[machine].numbers.keys() == numbers.keys()
    assert {name: numbers[name] for name in ROWS if name in numbers} == {
        name: row.numbers[machine] for name, row in ROWS.items() if machine in row.numbers
    }


CONDITIONS = st.builds(
    seccomp.Condition,
    st.integers(0, 2),
    st.sampled_from([0x3, 0x5, 0xF, 0x8001, 0xFFFFFFFF]),
    st.lists(st.integers(0, 8), max_size=3, unique=True).map(tuple),
    st.booleans(),
)
CLAUSES = st.lists(
    st.builds(seccomp.Clause, st.just(seccomp.ERRNO | 1), st.lists(CONDITIONS, max_size=3).map(tuple)), max_size=3
).map(tuple)


@given(CLAUSES, st.tuples(*[st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1))] * 3))
def test_any_policy_is_turned_into_its_complement(
    clauses: tuple[seccomp.Clause, ...], registers: tuple[int, ...]
) -> None:
    def true(condition: seccomp.Condition) -> bool:
        return (registers[condition.argument] & condition.mask in condition.values) == condition.among

    denied = any(all(map(true, clause.conditions)) for clause in clauses)
    regions = [
        region
        for region in profile._allowed(clauses)
        if all(registers[argument] & mask == value for argument, (mask, value) in region.items())
    ]
    assert len(regions) == (0 if denied else 1)


# --- libseccomp -------------------------------------------------------------------------------------------------------


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


MASKED_EQ, CTL_OPTIMIZE = 7, 8


@functools.cache
def libseccomp() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"libseccomp is not installed: {exc}")
    context = ctypes.c_void_p
    library.seccomp_init.argtypes, library.seccomp_init.restype = [ctypes.c_uint32], context
    library.seccomp_release.argtypes, library.seccomp_release.restype = [context], None
    library.seccomp_arch_native.restype = ctypes.c_uint32
    library.seccomp_arch_add.argtypes = library.seccomp_arch_remove.argtypes = [context, ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [context, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [context, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, context]
    library.seccomp_export_bpf.argtypes = [context, ctypes.c_int]
    return library


@functools.cache
def compiled(machine: str, stage: Stage, optimize: int) -> bytes:
    """What libseccomp makes of the profile when it is called as runc does."""
    library, made = libseccomp(), PROFILES[machine, stage]
    context = library.seccomp_init(0x50000 | made["defaultErrnoRet"])
    native = library.seccomp_arch_native()
    if native != ARCH[machine]:
        assert library.seccomp_arch_add(context, ARCH[machine]) == 0
        assert library.seccomp_arch_remove(context, native) == 0
    assert library.seccomp_attr_set(context, CTL_OPTIMIZE, optimize) == 0
    for rule in made["syscalls"]:
        action = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x50000 | rule.get("errnoRet", 0)}[rule["action"]]
        args = [Comparison(arg["index"], MASKED_EQ, arg["value"], arg["valueTwo"]) for arg in rule.get("args", [])]
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number != -1:  # newer than the library
                array = (Comparison * len(args))(*args)
                assert library.seccomp_rule_add_array(context, action, number, len(args), array) == 0
    with tempfile.TemporaryFile() as file:
        assert library.seccomp_export_bpf(context, file.fileno()) == 0
        library.seccomp_release(context)
        file.seek(0)
        return file.read()


@functools.cache
def known_to_libseccomp(machine: str) -> dict[str, int]:
    resolve = libseccomp().seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    return {name: number for name, number in CALLS[machine].items() if resolve(ARCH[machine], name.encode()) == number}


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
@pytest.mark.parametrize("optimize", [1, 2])  # runc asks for a search tree since 1.2
def test_libseccomp_reads_the_profile_as_this_test_does(machine: str, stage: Stage, optimize: int) -> None:
    program = compiled(machine, stage, optimize)
    known = known_to_libseccomp(machine)
    reading = Reading(PROFILES[machine, stage], machine, known)
    assert len(program) < 8 * 1500

    def both(number: int, args: Sequence[int] = ()) -> tuple[str, str]:
        run = simulate(program, machine, number, args)
        return "kill" if run.answer == "0x0" else run.answer, reading.answer(number, args)

    # Above the newest the answer is runc's own.
    numbers = [*range(reading.last + 1), *(range(X32, X32 + 600) if machine == "x86_64" else ())]
    answers = {number: both(number) for number in numbers}
    assert {number: pair for number, pair in answers.items() if pair[0] != pair[1]} == {}
    for name in CONDITIONAL:
        if name in known:
            for args in sweep(name):
                one, other = both(known[name], args)
                assert one == other, (name, args)
    for arch in (0x40000003, 0x40000028, *(value for other, value in ARCH.items() if other != machine)):
        assert simulate(program, machine, 1, arch=arch).answer == "0x0"


@settings(deadline=None)  # the machine may be busy
@given(QUESTIONS)
def test_chosen_arguments_fare_as_well_with_libseccomp(question: tuple[str, tuple[int, ...]]) -> None:
    name, args = question
    for machine, stage in MACHINE_AND_STAGE:
        if name in known_to_libseccomp(machine):
            number = CALLS[machine][name]
            expected = "ok" if filtered(machine, stage, number, args) == "ok" else "EPERM"
            for optimize in (1, 2):
                assert simulate(compiled(machine, stage, optimize), machine, number, args).answer == expected


# --- The real kernel --------------------------------------------------------------------------------------------------

PATH_HERE = 2**64 - 100  # AT_FDCWD
# label: call, arguments, answer at the outer stage, answer at the inner stage
ATTACKS: dict[str, tuple[str, list[int | str], str, str]] = {
    "io_uring_setup": ("io_uring_setup", [1, 0], "EPERM", "EPERM"),
    "ptrace": ("ptrace", [0, 0, 0, 0], "EPERM", "EPERM"),
    "process_vm_readv": ("process_vm_readv", [1, 0, 0, 0, 0, 0], "EPERM", "EPERM"),
    "pidfd_getfd": ("pidfd_getfd", [0, 0, 0], "EPERM", "EPERM"),
    "keyctl": ("keyctl", [0, 2**64 - 3, 0], "EPERM", "EPERM"),
    "add_key": ("add_key", [0, 0, 0, 0, 0], "EPERM", "EPERM"),
    "bpf": ("bpf", [0, 0, 0], "EPERM", "EPERM"),
    "perf_event_open": ("perf_event_open", [0, 0, 0, 0, 0], "EPERM", "EPERM"),
    "userfaultfd": ("userfaultfd", [1], "EPERM", "EPERM"),
    "memfd_secret": ("memfd_secret", [0], "EPERM", "EPERM"),
    "setns": ("setns", [0, 0], "EPERM", "EPERM"),
    "clone3": ("clone3", [0, 0], "ENOSYS", "ENOSYS"),
    "openat2": ("openat2", [0, 0, 0, 0], "ENOSYS", "ENOSYS"),
    "fsopen": ("fsopen", ["tmpfs", 0], "ENOSYS", "ENOSYS"),
    "AF_VSOCK": ("socket", [40, 1, 0], "EPERM", "EPERM"),
    "AF_ALG": ("socket", [38, 5, 0], "EPERM", "EPERM"),
    "AF_NETLINK": ("socket", [16, 3, 0], "EPERM", "EPERM"),
    "AF_PACKET": ("socket", [17, 2, 0], "EPERM", "EPERM"),
    "raw": ("socket", [2, 3, 1], "EPERM", "EPERM"),
    "ping": ("socket", [2, 2, 1], "EPERM", "EPERM"),
    "SCTP": ("socket", [2, 1, 132], "EPERM", "EPERM"),
    "AF_UNIX": ("socket", [1, 1, 0], "ok", "ok"),
    "AF_INET": ("socket", [2, 1, 0], "ok", "ok"),
    "TIOCSTI": ("ioctl", [0, 0x5412, 0], "EPERM", "EPERM"),
    "TIOCSTI with a high bit": ("ioctl", [0, 0x5412 | HIGH, 0], "EPERM", "EPERM"),
    "TIOCSETD": ("ioctl", [0, 0x5423, 0], "EPERM", "EPERM"),
    "lease": ("fcntl", [0, 1024, 0], "EPERM", "EPERM"),
    "chmod 04755": ("chmod", [".", 0o4755], "EPERM", "EPERM"),
    "chmod of what is missing": ("chmod", ["missing", 0o1755], "ENOENT", "ENOENT"),
    "fchmodat 02755": ("fchmodat", [PATH_HERE, ".", 0o2755], "EPERM", "EPERM"),
    "fchmodat of what is missing": ("fchmodat", [PATH_HERE, "missing", 0o1755], "ENOENT", "ENOENT"),
    "mkdirat 02755": ("mkdirat", [PATH_HERE, "missing/d", 0o2755], "EPERM", "EPERM"),
    "openat 04755": ("openat", [PATH_HERE, "missing/f", 0o101, 0o4755], "EPERM", "EPERM"),
    "openat with a stray mode": ("openat", [PATH_HERE, ".", 0, 0o7777], "ok", "ok"),
    "mknodat of a device": ("mknodat", [PATH_HERE, "missing/n", 0o020666, 0x103], "EPERM", "EPERM"),
    "personality changed": ("personality", [0x0040000], "EPERM", "EPERM"),
    "personality asked": ("personality", [0xFFFFFFFF], "ok", "ok"),
    "unshare": ("unshare", [0], "ok", "EPERM"),
    "unshare of what contradicts itself": ("unshare", [0x10000000 | 0x80000000], "EINVAL", "EPERM"),
    "clone of what contradicts itself": ("clone", [0x10000000 | 0x200, 0, 0, 0, 0], "EINVAL", "EPERM"),
    "clone": ("clone", [17, 0, 0, 0, 0], "ok", "ok"),
    "mount": ("mount", ["none", "missing", "tmpfs", 0, 0], "ENOENT", "EPERM"),
    "chroot": ("chroot", ["missing"], "ENOENT", "EPERM"),
}


def attacks(machine: str) -> dict[str, list[int | str]]:
    """What `attempts` takes: the attacks that there are on the machine."""
    made: dict[str, list[int | str]] = {
        label: [CALLS[machine][c], *args] for label, (c, args, *_) in ATTACKS.items() if c in CALLS[machine]
    }
    if machine == "x86_64":
        made["x32"] = [X32 | 39]
    return made


def expected_of_attacks(machine: str, stage: Stage) -> dict[str, str]:
    """What must come of them inside a boundary whose only filter is the profile."""
    answers = {label: {"outer": outer, "inner": inner} for label, (*_, outer, inner) in ATTACKS.items()}
    return {label: answers[label][stage] if label in answers else "SIGSYS" for label in attacks(machine)}


@pytest.mark.parametrize(("machine", "stage"), MACHINE_AND_STAGE)
def test_the_attacks_fail_by_the_profile_and_not_by_chance(machine: str, stage: Stage) -> None:
    """F1, F2, H5."""
    for label, expected in expected_of_attacks(machine, stage).items():
        number, *args = attacks(machine)[label]
        assert isinstance(number, int)
        found = READINGS[machine, stage].answer(number, [a if isinstance(a, int) else 0x7F0000001000 for a in args])
        assert found == {"EINVAL": "ok", "ENOENT": "ok", "SIGSYS": "kill"}.get(expected, expected), label


FILTERED = """
import os, sys
from actbox.guest import seccomp
program = sys.stdin.buffer.read()
seccomp.assembled = lambda stage, machine: program
seccomp.install("outer")
os.execv(sys.argv[1], sys.argv[1:])
"""


@live
@pytest.mark.parametrize("optimize", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_kernel_takes_what_libseccomp_made(stage: Stage, optimize: int, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FILTERED, *attempts.command(attacks(HERE), sys.executable)],
        input=compiled(HERE, stage, optimize),
        env={**os.environ, "PYTHONPATH": str(Path(seccomp.__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        timeout=15,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert attempts.read(process.stdout) == expected_of_attacks(HERE, stage)


@live
def test_without_the_profile_the_same_attacks_succeed(tmp_path: Path) -> None:
    # Only what any user on any machine may do is asked.
    """H14."""
    command = attempts.command(attacks(HERE), sys.executable)
    found = attempts.read(subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=15, check=True).stdout)
    labels = ("ptrace", "personality changed", "fchmodat 02755", "unshare", "AF_NETLINK")
    assert {label: found[label] for label in labels} == dict.fromkeys(labels, "ok")
    assert {found["mkdirat 02755"], found["openat 04755"], found["mknodat of a device"]} == {"ENOENT"}
