"""The policy of `guest/seccomp.py` as a seccomp profile for Docker, from which runc makes a filter with libseccomp.

The guest puts its own filters on as its first act. The profile covers the time before, and every process that the guest
did not start. Filters stack and the strictest answer wins, so neither can loosen the other.

The policy lists what it denies; the profile lists what that leaves. A list of denials would lose the newest of them,
because runc passes over a name that its libseccomp does not know, and would allow all that the kernel grew since.
So each rule about arguments stands here as its complement. The rules keep to what libseccomp can say:

- The conditions of a rule must all hold and be about different arguments. (runc makes a rule for each of them if two
  are about the same one, which allows more.) The rules of one call are alternatives.
- Comparisons are 64 bits wide. Only the masked one is used, and no mask reaches into the high half of a register, for
  the reason that `guest/seccomp.py` gives.
- A rule whose action is the default one is an error, or passed over.

Profile and policy allow the same. Some denials are worded differently. Where the guest's filter is on too, only the
last of these shows: of two errors the one of the newer filter counts, but an end comes before any error.

- A call denied for its arguments is answered EPERM, where the policy may have an error of sockets.
- A number in a hole of the table is answered EPERM. Above the newest call that both the profile and libseccomp know,
  runc answers ENOSYS: a call that is newer than libseccomp does not exist, whether the policy allows it or not.
- A call of another instruction set ends its thread, where the policy ends the process; so does one of x32, which the
  policy answers ENOSYS.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from actbox.engines.calls import UNMENTIONED
from actbox.guest import seccomp
from actbox.guest.syscalls import MACHINES, NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from actbox.guest.seccomp import Clause, Condition, Stage

__all__ = ["docker_profile", "to_json"]

# The machine alone and none of its relatives: libseccomp ends whoever calls by another convention.
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def docker_profile(stage: Stage, machine: str) -> dict[str, Any]:
    """The profile as Docker reads it, of plain dicts, lists, strings and numbers.

    "outer" is for a container of nested sessions, "inner" for the container of a single one. The same arguments always
    give the same profile. `machine` is as in `os.uname().machine`, and that of the Docker daemon.

    Raises:
        UnsupportedMachine: there is no system call table for the machine.
    """
    if machine not in MACHINES:
        known = ", ".join(MACHINES)
        raise seccomp.UnsupportedMachine(f"seccomp: there is no profile for machine {machine!r}, only for {known}")
    policy = seccomp.POLICIES[stage]
    if unknown := policy.keys() - NAMES:
        raise RuntimeError(f"seccomp: the policy names calls that no machine has: {sorted(unknown)}")

    alike: dict[tuple[Clause, ...], list[str]] = {}
    for call in sorted(UNMENTIONED[machine] | MACHINES[machine].numbers.keys()):
        alike.setdefault(policy.get(call, ()), []).append(call)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": seccomp.EPERM,
        "architectures": [_ARCHITECTURES[machine]],
        "syscalls": [rule for clauses, names in alike.items() for rule in _rules(names, clauses)],
    }


def to_json(profile: Mapping[str, Any]) -> str:
    """What follows `seccomp=` in `HostConfig.SecurityOpt`."""
    return json.dumps(profile, separators=(",", ":"))


def _rules(names: list[str], clauses: Sequence[Clause]) -> Iterator[dict[str, Any]]:
    for region in _allowed(clauses):
        rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW"}
        if region:
            rule["args"] = [
                {"index": argument, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
                for argument, (mask, value) in sorted(region.items())
            ]
        yield rule
    error = clauses[0].action ^ seccomp.ERRNO if clauses and not clauses[0].conditions else seccomp.EPERM
    if error != seccomp.EPERM:
        yield {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error}


# --- Complements ------------------------------------------------------------------------------------------------------


class _Bits(NamedTuple):
    """All registers with `register & mask == value`."""

    mask: int
    value: int


# Where every named argument is as told. The regions of a call share nothing, so that it does not matter in which order
# libseccomp asks.
_Region = dict[int, _Bits]


def _allowed(clauses: Sequence[Clause]) -> list[_Region]:
    """Where no clause holds; every clause of the policy denies."""
    regions: list[_Region] = [{}]
    for clause in clauses:
        regions = [part for region in regions for part in _outside(region, clause.conditions)]
    return regions


def _outside(region: _Region, conditions: Sequence[Condition]) -> Iterator[_Region]:
    """The parts of a region in which not all the conditions hold."""
    if not conditions:
        return
    argument, mask, named, among = conditions[0]
    # A value with a bit outside the mask never occurs; libseccomp would cut the bit off, and then it does.
    values = [value for value in named if value & mask == value]
    listed = [_Bits(mask, value) for value in values]
    others = list(_others(mask, values))
    holds, fails = (listed, others) if among else (others, listed)
    for bits in fails:
        yield from _meet(region, argument, bits)
    for bits in holds:
        for part in _meet(region, argument, bits):
            yield from _outside(part, conditions[1:])


def _meet(region: _Region, argument: int, bits: _Bits) -> Iterator[_Region]:
    """The one part of a region in which the argument has these bits too, if there is any."""
    mask, value = region.get(argument, _Bits(0, 0))
    if not (value ^ bits.value) & mask & bits.mask:
        yield {**region, argument: _Bits(mask | bits.mask, value | bits.value)}


def _others(mask: int, values: Sequence[int], known: int = 0, value: int = 0) -> Iterator[_Bits]:
    """All registers, among those with `register & known == value`, whose masked value is none of `values`.

    Bit by bit from the highest, as in a search: a branch that leads to none of the values is one set.
    """
    ahead = [candidate for candidate in values if candidate & known == value]
    if not ahead:
        yield _Bits(known, value)
    elif free := mask & ~known:
        bit = 1 << (free.bit_length() - 1)
        yield from _others(mask, ahead, known | bit, value)
        yield from _others(mask, ahead, known | bit, value | bit)
