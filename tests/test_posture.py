"""The posture: what a session can see of its own boundary is, to the last entry, what `posture/ENGINE.json` says.

A difference of any kind fails, also one for the better: then the file is to be changed with whatever changed it, and
the change read by somebody. Where the file is missing it is written, and the test fails once.

What depends on the machine is put in words by rules that still demand what matters: see `in_words`.
"""

# Described is by system calls, and sent into the session without this file's imports.
# ruff: noqa: PLC0415, PTH109, PTH115, PTH123, PTH208

from __future__ import annotations

import ctypes
import difflib
import errno
import json
import os
import signal
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sandboxes import image_variables
from test_containment import inside

from actbox import CodeExecutionContainer, CodeExecutor, Limits
from actbox.guest import landlock

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

KEY = "one"
# Of a mount's options, what bounds those who use it. How times of access are kept is the machine's affair.
OPTIONS = {"ro", "rw", "nosuid", "nodev", "noexec", "nosymfollow"}
# And of a file system's own, what we ask for. How many inodes come with a size depends on the kernel.
RESTRICTED = "bind nodev nosuid ro"
OWN_OPTIONS = ("size", "nr_inodes", "mode", "ptmxmode", "hidepid", "subset")


# --- Inside -----------------------------------------------------------------------------------------------------------


def described() -> dict[str, Any]:
    """Everything of the boundary that the session can see of itself."""
    import fcntl
    import resource

    def text(path: str) -> str:
        with open(path) as file:
            return file.read()

    def descriptor(number: str) -> str | None:
        try:
            mode, flags = os.fstat(int(number)).st_mode, fcntl.fcntl(int(number), fcntl.F_GETFL)
        except OSError:
            return None  # it was that of the listing itself
        target = os.readlink(f"/proc/self/fd/{number}")
        access = ("read", "write", "read and write")[flags & os.O_ACCMODE]
        if stat.S_ISSOCK(mode):
            with socket.socket(fileno=os.dup(int(number))) as copy:
                return f"{copy.family.name} {copy.type.name}, {access}"
        return f"{'pipe' if stat.S_ISFIFO(mode) else target}, {access}"

    def device(name: str) -> str:
        told = os.lstat(f"/dev/{name}")
        if stat.S_ISLNK(told.st_mode):
            return f"link to {os.readlink(f'/dev/{name}')}"
        number = f" {os.major(told.st_rdev)}:{os.minor(told.st_rdev)}" if stat.S_ISCHR(told.st_mode) else ""
        return f"{stat.filemode(told.st_mode)}{number}"

    def refused(path: str) -> str:
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError as exc:
            return errno.errorcode[exc.errno or 0]
        return "ok"

    status = {name: value.strip() for name, _, value in (line.partition(":") for line in text("/proc/self/status").splitlines())}  # noqa: E501  # fmt: skip
    libc = ctypes.CDLL(None)
    numbers = [name for name in os.listdir("/proc/self/fd") if name.isdigit()]
    kinds = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    kinds |= {"RLIMIT_LOCKS": 10, "RLIMIT_SIGPENDING": 11, "RLIMIT_MSGQUEUE": 12, "RLIMIT_NICE": 13}
    return {
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")},
        "capabilities": {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
        "no new privileges": status["NoNewPrivs"],
        "system call filters": [status["Seccomp"], status.get("Seccomp_filters", "unknown")],
        "signals": {"blocked": status["SigBlk"], "ignored": status["SigIgn"]},
        "users": {
            **{name: status[name].split() for name in ("Uid", "Gid", "Groups")},
            **{name: text(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map", "setgroups")},
        },
        "dumpable, securebits, keepcaps": [libc.prctl(option, 0, 0, 0, 0) for option in (3, 27, 7)],
        "descriptors": sorted(found for found in map(descriptor, numbers) if found is not None),
        "mounts": [line.split() for line in text("/proc/self/mountinfo").splitlines()],
        "limits": {name.removeprefix("RLIMIT_"): list(resource.getrlimit(kind)) for name, kind in kinds.items()},
        "variables": sorted(os.environ),
        "devices": {name: device(name) for name in os.listdir("/dev")},
        "interfaces": [line.partition(":")[0].strip() for line in text("/proc/net/dev").splitlines()[2:]],
        "routes": len(text("/proc/net/route").splitlines()[1:]),
        "landlock": {path: refused(path) for path in ("/proc/self/comm", "/proc/self/oom_score_adj")},
        "oom_score_adj": int(text("/proc/self/oom_score_adj")),
        "processes": sorted(name for name in os.listdir("/proc") if name.isdigit()),
        "session and group": [os.getsid(0), os.getpgid(0)],
        "names": [os.uname().nodename, text("/proc/sys/kernel/domainname").strip()],
        "working directory": os.getcwd(),
    }


# --- Outside ----------------------------------------------------------------------------------------------------------


def mount_in_words(fields: list[str]) -> tuple[str, str]:
    """The place of a mount, and what it is: of a bind the options alone, of a new file system its own as well."""
    place, options = fields[4], sorted(OPTIONS & {*fields[5].split(",")})
    end = fields.index("-")
    shared = [field for field in fields[6:end] if not field.startswith("master")]
    kind, own = fields[end + 1], fields[end + 3].split(",")
    if kind in ("tmpfs", "proc", "devpts") and fields[3] == "/":
        asked = [one for one in own if one.partition("=")[0] in OWN_OPTIONS]
        return place, " ".join([kind, *options, *shared, *asked])
    return place, " ".join(["bind", *options, *shared])


def mounts_in_words(found: list[list[str]]) -> dict[str, str]:
    """Each mount by its place. Those of the system or the image are one entry, if they are what they must be."""
    told: dict[str, str] = {}
    for fields in found:
        place, words = mount_in_words(fields)
        own = place == "/" or place.startswith(("/app", "/dev", "/proc", "/sys", "/tmp", "/run"))
        if not own and words == RESTRICTED:
            told["of the system, of the environment or of the image"] = words
        else:
            told[place if place not in told else f"{place} (again)"] = words
    return told


def limits_in_words(found: dict[str, list[int]], limits: Limits) -> dict[str, str]:
    """The bounds but those of the machine; that of the address space counts from what is mapped at the start."""
    told = {name: f"{soft}" if soft == hard else f"{soft}, then {hard}" for name, (soft, hard) in found.items()}
    soft, hard = found["AS"]
    mapped = soft - 4 * limits.memory
    if soft == hard and 0 < mapped < limits.memory:
        told["AS"] = "four times the memory, and what is mapped at the start"
    for name in ("STACK", "SIGPENDING"):
        told[name] = "the machine's"
    return told


def namespaces_in_words(found: dict[str, str], neighbours: dict[str, str]) -> dict[str, str]:
    """Whose each namespace is."""
    told: dict[str, str] = {}
    for name, target in found.items():
        if target == os.readlink(f"/proc/self/ns/{name}"):
            told[name] = "the host's"
        else:
            told[name] = "shared with neighbours" if target == neighbours[name] else "its own"
    return told


def in_words(found: dict[str, Any], neighbour: dict[str, Any], limits: Limits, engine: str) -> dict[str, Any]:
    """The same without what depends on the machine, on the image or on who this process is."""
    told = {**found, "mounts": mounts_in_words(found["mounts"]), "limits": limits_in_words(found["limits"], limits)}
    told["namespaces"] = namespaces_in_words(found["namespaces"], neighbour["namespaces"])
    users = dict(found["users"])
    for name in ("uid_map", "gid_map"):
        mapped, outside, count = users[name]
        users[name] = [f"{mapped} is", "root" if outside == "0" else "somebody", f"outside, {count} in all"]
    # An ordinary user cannot give up supplementary groups: they stay, as groups without a name. Its own group is none.
    users["Groups"] = [group for group in users["Groups"] if group not in ("65534", "1000")]
    # What the host's process was told to ignore by who started it is no part of the boundary. SIGPIPE and SIGXFSZ are
    # ignored by every Python.
    pythons = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    inherited = int(status.partition("SigIgn:")[2].split()[0], 16) & ~pythons
    told["signals"] = {**found["signals"], "ignored": f"{int(found['signals']['ignored'], 16) & ~inherited:016x}"}
    told["users"] = {name: " ".join(told) for name, told in users.items()}
    # An interpreter may have libraries and packages of its own; an image has variables of its own.
    others = image_variables() if engine == "docker" else {"LD_LIBRARY_PATH", "PYTHONPATH"}
    told["variables"] = sorted({*found["variables"]} - others)
    return told


async def looked_at(workspace: Path, engine: str) -> dict[str, Any]:
    """The posture of a session that has a neighbour, in words."""
    limits = Limits()
    async with (
        CodeExecutionContainer(workspace_path=workspace, engine=engine, preload=(), limits=limits) as container,
        CodeExecutor(KEY, container.workspace, container.port) as one,
        CodeExecutor("other", container.workspace, container.port) as other,
    ):
        return in_words(await inside(one, described), await inside(other, described), limits, engine)


def differences(found: dict[str, Any], engine: str) -> list[str]:
    """What is otherwise than the file says, line by line; the file is written if there is none."""
    file = Path(__file__).parent / "posture" / f"{engine}.json"
    lines = f"{json.dumps(found, indent=1, sort_keys=True)}\n".splitlines(keepends=True)
    if not file.exists():
        file.write_text("".join(lines), encoding="ascii")
        return [f"{file.name} was missing, and is written: read it"]
    expected = file.read_text(encoding="ascii").splitlines(keepends=True)
    return list(difflib.unified_diff(expected, lines, "as it should be", "as it is", n=2))


async def test_a_session_is_bounded_as_the_file_says_and_by_nothing_else(workspace_path: Path, engine: str) -> None:
    """H13."""
    if landlock.offered() < 2:
        pytest.skip("this system has no Landlock, and the file tells of one that has")
    found = differences(await looked_at(workspace_path, engine), engine)
    assert not found, "".join(["the posture is another one:\n", *found])


# The guest, changed in one place, and what the difference must name.
CHANGES = {
    "a limit": ("isolation.py", r"\(resource\.RLIMIT_MEMLOCK, 0\)", "(resource.RLIMIT_MEMLOCK, 4096)", '"MEMLOCK"'),
    "an option of a mount": (
        "isolation.py",
        r"MS_NOSUID \| MS_NOEXEC, options",
        "MS_NOSUID, options",
        '"devpts nosuid rw',
    ),
    "the size of a mount": ("isolation.py", r"size=64k,nr_inodes=64", "size=128k,nr_inodes=64", "size=128k"),
    "a mount more": (
        "isolation.py",
        r'    os\.mkdir\(f"\{NEW_ROOT\}/proc"\)\n',
        """    for name in ("proc", "more"):
        os.mkdir(f"{NEW_ROOT}/{name}")
    _mount("more", "tmpfs", f"{NEW_ROOT}/more", "tmpfs", MS_NOSUID | MS_NODEV, None)
""",
        '"/more"',
    ),
    "a device less": ("isolation.py", r'"urandom", "tty"\)', '"urandom")', '"tty"'),
    "the place in the queue": ("isolation.py", r'file\.write\("500"\)', 'file.write("400")', '"oom_score_adj"'),
    "a descriptor more": ("kernel.py", r"for fd in \[\*sorted.*\]:", "for fd in ():", "AF_UNIX SOCK_SEQPACKET"),
    "a filter less": ("isolation.py", r'seccomp\.install\("inner"\)', "pass", '"system call filters"'),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_any_change_of_the_boundary_is_a_difference(
    change: str, change_guest: Callable[[str, str, str], None], workspace_path: Path, engine: str
) -> None:
    """H13, H14: and the difference names it."""
    file, pattern, new, named = CHANGES[change]
    change_guest(file, pattern, new)
    found = await looked_at(workspace_path, engine)
    told = differences(found, engine)
    assert [line for line in told if line.startswith(("+", "-"))][2:]
    assert named in "".join(told)
