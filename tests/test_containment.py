"""Containment: every case is a real attempt, made from inside a session of the real engine.

A test's docstring begins with the number of its case. The functions of the part "What is tried inside" are sent into
the session as source, by `inside`; what they return comes back as JSON. The last part takes one layer of protection
away and shows that a case then fails: the layer is what kept it, and the case would tell if it went missing.
"""

# The attempts read like the system calls they make, and are sent into the session without this file's imports.
# ruff: noqa: PLC0415, PTH101, PTH102, PTH104, PTH108, PTH113, PTH115, PTH116, PTH120, PTH123, PTH207, PTH208, PTH211

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import ctypes
import errno
import glob
import inspect
import json
import os
import pty
import pwd
import random
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import unicodedata
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest
from aiodocker.containers import DockerContainer, DockerContainers
from needs import lacking
from sandboxes import containers, image_variables, sandboxed, supervisors

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    ExecutionClient,
    ExecutionError,
    InvalidKey,
    KernelDied,
    SandboxUnavailable,
    Workspace,
    WorkspaceError,
    execution_environment,
    sessions,
)
from actbox.engines.docker import engine as docker_engine
from actbox.engines.docker import plan
from actbox.guest import seccomp
from actbox.guest.syscalls import MACHINES

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]

pytestmark = pytest.mark.anyio

MACHINE = MACHINES.get(os.uname().machine)
NUMBERS = dict(MACHINE.numbers) if MACHINE is not None else {}

# --- What is tried inside ---------------------------------------------------------------------------------------------

PRELUDE = """
from __future__ import annotations
import asyncio, builtins, concurrent.futures, contextlib, ctypes, errno, glob, http.server, json, mmap, multiprocessing
import os, pty, pwd, random, re, shutil, signal, socket, sqlite3, stat, subprocess, sys, tempfile, threading, uuid
from multiprocessing import shared_memory
"""


def said(action: Callable[[], object]) -> str:
    """The name of the error, or "ok"."""
    try:
        result = action()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, repr(exc))
    if isinstance(result, socket.socket):
        result.close()
    return "ok"


def call(number: int, *args: int | bytes | None) -> str:
    """What the kernel says to a system call, past the C library."""
    libc = ctypes.CDLL(None, use_errno=True)
    values = [ctypes.c_ulong(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    values += [ctypes.c_ulong(0)] * (6 - len(values))
    result = libc.syscall(ctypes.c_long(number), *values)
    return "ok" if result != -1 else errno.errorcode[ctypes.get_errno()]


def in_child(action: Callable[[], str]) -> str:
    """The answer of an action in a process of its own, which has one thread and may change."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


async def inside(executor: ExecutionClient, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of this file in a session."""
    source = "".join(inspect.getsource(part) for part in (said, call, in_child, pids, function))
    code = f"{PRELUDE}{source}\nprint(json.dumps({function.__name__}(*json.loads({json.dumps(args)!r}))))"
    # Some look at every file that there is, on a machine that may have much else to do.
    result = await executor.execute(code, timeout=60)
    return json.loads((result.text or "").splitlines()[-1])


def opened(paths: list[str]) -> dict[str, str]:
    return {path: said(lambda path=path: os.close(os.open(path, os.O_RDONLY))) for path in paths}


def opened_from_descriptors(path: str) -> list[str]:
    """Open a path from every descriptor that might be a folder's."""
    return sorted({said(lambda fd=fd: os.close(os.open(path, os.O_RDONLY, dir_fd=fd))) for fd in range(1024)})


def mounted() -> list[list[str]]:
    """Every mount: its place, its device, and what of that it shows."""
    with open("/proc/self/mountinfo") as file:
        return [[line.split()[4], line.split()[2], line.split()[3]] for line in file]


def texts(paths: list[str]) -> list[str]:
    found: list[str] = []
    for path in paths:
        with open(path) as file:
            found.append(file.read())
    return found


def listed(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


def users() -> list[str]:
    return [entry.pw_name for entry in pwd.getpwall()]


def created(paths: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        found[path] = said(lambda path=path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)))
        found[f"{path}/"] = said(lambda path=path: os.mkdir(f"{path}.d"))
    return found


def changed(path: str) -> dict[str, str]:
    """Every way to change a file that is there, or its folder."""
    folder = os.path.dirname(path)
    return {
        "truncate on opening": said(lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))),
        "truncate": said(lambda: os.truncate(path, 0)),
        "unlink": said(lambda: os.unlink(path)),
        "rename": said(lambda: os.rename(path, f"{path}.old")),
        "chmod": said(lambda: os.chmod(path, 0o777)),
        "chown": said(lambda: os.chown(path, os.getuid(), os.getgid())),
        "utime": said(lambda: os.utime(path)),
        "symlink": said(lambda: os.symlink("/etc/passwd", f"{folder}/new-link")),
        "link": said(lambda: os.link(path, f"{folder}/new-hard")),
        "mkdir": said(lambda: os.mkdir(f"{folder}/new-folder")),
        "setxattr": said(lambda: os.setxattr(path, "user.x", b"x")),
    }


def written_programs() -> dict[str, str]:
    """Open for writing what every session runs."""
    paths = ["/proc/self/exe", "/proc/1/exe", os.path.realpath(sys.executable), json.__file__]
    modules = [module for name, module in sys.modules.items() if name.startswith("actbox_guest")]
    paths += sorted({file for module in modules if (file := getattr(module, "__file__", None))})
    return {path: said(lambda path=path: os.close(os.open(path, os.O_WRONLY))) for path in paths}


def mounts_undone(numbers: dict[str, int]) -> dict[str, str]:
    with open("/proc/self/mountinfo") as file:
        places = sorted({line.split()[4] for line in file})
    bind, remount, detach = 4096, 32, 2
    found = {f"umount {place}": call(numbers["umount2"], place.encode(), detach) for place in places}
    for place in places:
        found[f"remount {place}"] = call(numbers["mount"], None, place.encode(), None, bind | remount)
    for place in ("/tmp", "/usr", "/app", "/proc"):
        found[f"cover {place}"] = call(numbers["mount"], b"tmpfs", place.encode(), b"tmpfs", 0)
    return found


def namespaces_left(numbers: dict[str, int]) -> dict[str, str]:
    """New namespaces, which would bring the right to mount, and what it would be used for."""
    new = {"user": 0x10000000, "mnt": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000}
    new |= {"uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}
    shared_fs = 0x200  # contradicts new user and mount namespaces: no process comes of it without a filter either
    found = {
        f"unshare {name}": in_child(lambda flag=flag: call(numbers["unshare"], flag)) for name, flag in new.items()
    }
    for name, flag in new.items():
        if name != "time":  # of clone's flags that bit is none: it belongs to the signal
            found[f"clone {name}"] = call(numbers["clone"], flag | shared_fs)
    found["clone3"] = call(numbers["clone3"], bytes(88), 88)
    for name in ("user", "mnt", "net", "pid"):
        fd = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
        found[f"setns {name}"] = in_child(lambda fd=fd: call(numbers["setns"], fd, 0))
        os.close(fd)
    return found


def mounts_in_own_namespace(numbers: dict[str, int]) -> dict[str, str]:
    """What a session would do with the right to mount that a user namespace of its own brings."""
    user, mnt, bind, remount = 0x10000000, 0x20000, 4096, 32

    def then(number: int, *args: int | bytes | None) -> str:
        def both() -> str:
            entered = call(numbers["unshare"], user | mnt)
            return f"{entered} {call(number, *args)}"

        return in_child(both)

    return {
        "umount": then(numbers["umount2"], b"/tmp", 2),
        "remount": then(numbers["mount"], None, b"/usr", None, bind | remount),
        "proc": then(numbers["mount"], b"proc", b"/tmp", b"proc", 0),
        "cover": then(numbers["mount"], b"tmpfs", b"/tmp", b"tmpfs", 0),
    }


def calls_refused(numbers: dict[str, int], names: list[str]) -> dict[str, str]:
    return {name: call(numbers[name]) for name in names if name in numbers}


def set_id_programs_run() -> dict[str, int]:
    """Start the set-uid programs that there are, and see whose processes they are."""

    def effective_uid(pid: int) -> int:
        # While it is still being started it has the rights of who starts it.
        while True:
            with open(f"/proc/{pid}/status") as file:
                told = dict(line.split(":\t", 1) for line in file if ":\t" in line)
            if told["State"][0] in "SZ":
                return int(told["Uid"].split()[1])

    found: dict[str, int] = {}
    for path in [*glob.glob("/usr/bin/*"), *glob.glob("/usr/lib/*/*-helper")]:
        with contextlib.suppress(OSError):
            if not os.stat(path).st_mode & stat.S_ISUID:
                continue
            reader, writer = os.pipe()
            # It waits for the pipe, before or after it has the rights of its owner.
            process = subprocess.Popen([path, "-"], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with contextlib.suppress(OSError):
                found[path] = effective_uid(process.pid)
            process.kill()
            process.wait()
            os.close(reader)
            os.close(writer)
    return found


def personalities(number: int) -> list[str]:
    """Asked, and changed: no address randomisation; another system."""
    return [call(number, 0xFFFFFFFF), call(number, 0x0040000), call(number, 8)]


def set_id_files(numbers: dict[str, int]) -> dict[str, str]:
    with open("plain", "w") as file:
        fd = file.fileno()
        os.mkdir("folder")
        creating = os.O_CREAT | os.O_WRONLY
        return {
            "chmod setuid": said(lambda: os.chmod("plain", 0o4755)),
            "chmod setgid": said(lambda: os.chmod("plain", 0o2755)),
            "chmod folder": said(lambda: os.chmod("folder", 0o2755)),
            "fchmod": said(lambda: os.fchmod(fd, 0o4755)),
            "chmod at": said(lambda: os.chmod("plain", 0o4755, dir_fd=os.open(".", os.O_RDONLY))),
            "open": said(lambda: os.open("made", creating, 0o4755)),
            "unnamed": said(lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755)),
            "mkdir": said(lambda: os.mkdir("made.d", 0o2755)),
            "mknod": said(lambda: os.mknod("made", 0o104755)),
            "device": said(lambda: os.mknod("made", 0o020666, 0x103)),
            "openat2": call(numbers["openat2"], -100 & 2**64 - 1, b"made", bytes(24), 24),
        }


def descriptors() -> list[dict[str, Any]]:
    """Every open file of every process here that may be looked into, with the family of what is a socket."""
    found: list[dict[str, Any]] = []
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue  # it was that of the listing itself
        entry: dict[str, Any] = {"fd": fd, "kind": stat.S_IFMT(mode), "link": os.readlink(f"/proc/self/fd/{fd}")}
        if stat.S_ISSOCK(mode):
            with socket.socket(fileno=os.dup(fd)) as copy:
                entry["family"] = int(copy.family)
                name = copy.getsockname()
                entry["name"] = name if isinstance(name, str) else repr(name)
        found.append(entry)
    return found


def readable_processes() -> dict[str, dict[str, str]]:
    """What can be had of each process that is seen: the text, or the error."""
    found: dict[str, dict[str, str]] = {}
    for pid in pids():
        entry: dict[str, str] = {}
        for name in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    entry[name] = file.read().decode("latin-1")
            except OSError as exc:
                entry[name] = errno.errorcode[exc.errno or 0]
        found[str(pid)] = entry
    return found


def other_process(pid: int) -> dict[str, str]:
    """Look into a process, by every file of /proc that tells something."""
    base = f"/proc/{pid}"
    found = {name: said(lambda name=name: os.close(os.open(f"{base}/{name}", os.O_RDONLY))) for name in
             ("mem", "maps", "environ", "cmdline", "auxv", "fd", "root", "cwd", "stack", "syscall")}  # fmt: skip
    found["root/etc"] = said(lambda: os.listdir(f"{base}/root/etc"))
    found["mem to write"] = said(lambda: os.close(os.open(f"{base}/mem", os.O_RDWR)))
    found["exe"] = said(lambda: os.readlink(f"{base}/exe"))
    found["listing of fd"] = said(lambda: os.listdir(f"{base}/fd"))
    found["ns"] = said(lambda: os.readlink(f"{base}/ns/mnt"))
    return found


def memory_matches(pattern: str) -> list[str]:
    """Where a regular expression matches this process's memory."""
    wanted = re.compile(pattern.encode())
    found: list[str] = []
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            begin, end = (int(part, 16) for part in span.split("-"))
            if not rights.startswith("r") or line.rstrip().endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            with contextlib.suppress(OSError, ValueError, OverflowError):
                memory.seek(begin)
                found += [line for _ in wanted.finditer(memory.read(end - begin))]
    return found


def environment() -> dict[str, str]:
    return dict(os.environ)


def connected(addresses: list[list[Any]]) -> dict[str, str]:
    """Try to reach each (host, port) over TCP, and by a datagram."""
    found: dict[str, str] = {}
    for host, port in addresses:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if said(lambda family=family: socket.socket(family)) != "ok":
            continue  # a kernel without it
        found[f"tcp {host} {port}"] = said(lambda host=host, port=port: socket.create_connection((host, port), 3))
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            udp.settimeout(3)
            answer = said(lambda udp=udp, host=host, port=port: udp.connect((host, port)))
            # On a loopback a datagram goes out; that nobody listens is told by the call after it.
            for _ in range(2 if answer == "ok" else 0):
                answer = said(lambda udp=udp: udp.send(b"x"))
            found[f"udp {host} {port}"] = answer
    return found


def resolved(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = repr(socket.getaddrinfo(name, 80))
        except socket.gaierror:
            found[name] = "gaierror"
    return found


def abstract_connected(name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as client:
            found[kind.name] = said(lambda client=client: client.connect(f"\0{name}"))
    return found


def families() -> dict[str, str]:
    """The answer for every family there may be, and for kinds that are not TCP or UDP."""
    found = {
        str(number): said(
            lambda number=number: socket.socket(
                number, socket.SOCK_STREAM if number in (1, 2, 10, 40) else socket.SOCK_DGRAM
            )
        )
        for number in range(1, 50)
    }
    found["raw"] = said(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    found["ping"] = said(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP))
    found["sctp"] = said(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132))
    return found


def interfaces() -> list[str]:
    with open("/proc/net/dev") as file:
        return [line.partition(":")[0].strip() for line in file.readlines()[2:]]


def killed_all() -> str:
    """Signal everything that can be named, but this process."""
    said(lambda: os.kill(-1, signal.SIGKILL))
    for pid in range(1, 100_001):
        if pid != os.getpid():
            said(lambda pid=pid: os.kill(pid, signal.SIGKILL))
    said(lambda: os.kill(1, signal.SIGSTOP))
    return "alive"


def signalled(numbers: list[int]) -> list[str]:
    kinds = (0, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGSTOP, signal.SIGKILL)
    return sorted({said(lambda pid=pid, kind=kind: os.kill(pid, kind)) for pid in numbers for kind in kinds})


def traced(numbers: dict[str, int], pid: int) -> dict[str, str]:
    attach, traceme, seize = 16, 0, 0x4206
    return {
        "attach": call(numbers["ptrace"], attach, pid),
        "seize": call(numbers["ptrace"], seize, pid),
        "attach to pid 1": call(numbers["ptrace"], attach, 1),
        "traceme": call(numbers["ptrace"], traceme),
    }


def reached_into(numbers: dict[str, int], pid: int) -> dict[str, str]:
    own = os.getpid()
    found = {
        "process_vm_readv": call(numbers["process_vm_readv"], pid),
        "process_vm_readv of pid 1": call(numbers["process_vm_readv"], 1),
        "process_vm_writev": call(numbers["process_vm_writev"], pid),
        "kcmp": call(numbers["kcmp"], own, pid),
        "process_madvise": call(numbers["process_madvise"], 0),
        "process_mrelease": call(numbers["process_mrelease"], 0),
    }
    fd = os.pidfd_open(1)
    found["pidfd_getfd of pid 1"] = call(numbers["pidfd_getfd"], fd, 0)
    os.close(fd)
    return found


def status(pid: str) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def randoms() -> dict[str, str]:
    found = {
        "random": repr(random.random()),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "urandom": os.urandom(8).hex(),
        "temporary name": tempfile.mkdtemp(),
    }
    if "numpy" in sys.modules:
        import numpy as np

        found["numpy"] = repr(float(np.random.rand()))  # noqa: NPY002 - the old generator is the one that is shared
        found["numpy generator"] = repr(float(np.random.default_rng().random()))
    return found


def spoiled() -> None:
    """Change what a session shares with the process it was forked from, for whoever would see it."""
    import math

    math.pi = 3  # pyright: ignore[reportAttributeAccessIssue]
    builtins.open = builtins.print  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["colorsys"] = sys.modules["math"]
    sys.path.insert(0, "/tmp/evil")
    os.environ["EVIL"] = "1"
    if "numpy" in sys.modules:
        sys.modules["numpy"].pi = 3  # pyright: ignore[reportAttributeAccessIssue]


def pristine() -> list[str]:
    import colorsys
    import math

    found: list[str] = []
    found += ["math"] * (math.pi < 3.1)
    found += ["open"] * (builtins.open is builtins.print)
    found += ["modules"] * (not hasattr(colorsys, "rgb_to_hls"))
    found += ["path"] * ("/tmp/evil" in sys.path)
    found += ["environment"] * ("EVIL" in os.environ)
    found += ["numpy"] * ("numpy" in sys.modules and sys.modules["numpy"].pi < 3.1)
    return found


def shared_with_others(write: bool) -> dict[str, str]:  # noqa: FBT001 - called by `inside`
    """Leave something, or look for it, in every place that processes share."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 0o1600 if write else 0o600  # IPC_CREAT

    def system_v(get: str, *args: int) -> str:
        return "ok" if getattr(libc, get)(*args) != -1 else errno.errorcode[ctypes.get_errno()]

    def file(path: str) -> str:
        return said(lambda: os.close(os.open(path, os.O_CREAT | os.O_RDWR if write else os.O_RDWR)))

    def abstract() -> None:
        holder = socket.socket(socket.AF_UNIX)
        if write:
            holder.bind("\0actbox-between")
            holder.listen()
            builtins.kept = holder  # pyright: ignore[reportAttributeAccessIssue]
        else:
            holder.connect("\0actbox-between")

    def loopback() -> None:
        if write:
            builtins.server = socket.create_server(("127.0.0.1", 47113))  # pyright: ignore[reportAttributeAccessIssue]
        else:
            socket.create_connection(("127.0.0.1", 47113), 3).close()

    return {
        "/tmp": file("/tmp/between"),
        "/dev/shm": file("/dev/shm/between"),
        "shm": system_v("shmget", 0x4711, 4096, flags),
        "sem": system_v("semget", 0x4711, 1, flags),
        "msg": system_v("msgget", 0x4711, flags),
        "abstract": said(abstract),
        "loopback": said(loopback),
    }


def devices() -> list[str]:
    return sorted(os.listdir("/dev"))


def kernel_settings() -> dict[str, str]:
    """Write what changes the machine, as it is."""

    def written(path: str) -> None:
        with open(path, "rb+", buffering=0) as file:
            file.write(file.read(4096) or b"0")

    paths = [*glob.glob("/proc/sys/**", recursive=True), "/proc/sysrq-trigger", "/proc/1/oom_score_adj"]
    files = [path for path in paths if os.path.isfile(path)]
    found = {path: said(lambda path=path: written(path)) for path in files}
    for path in ("/proc/kcore", "/proc/kmsg", "/sys/kernel", "/sys/fs/cgroup", "/dev/mem", "/dev/kmsg", "/dev/fuse"):
        found[path] = said(lambda path=path: os.close(os.open(path, os.O_RDONLY)))
    return found


def linked(paths: list[str]) -> dict[str, str]:
    """Give a file of another mount a name in the session's own folder."""
    return {path: said(lambda path=path: os.link(path, "taken")) for path in paths}


def sockets_seen() -> list[str]:
    """Every socket that has a name in a folder or in the kernel's list."""
    found: list[str] = []
    folders = ["/"]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and entry.path != "/proc":
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and stat.S_ISSOCK(os.lstat(entry.path).st_mode):
                    found.append(entry.path)
    with open("/proc/net/unix") as file:
        return found + [line.split()[7] for line in file.readlines()[1:] if len(line.split()) > 7]


def bounds_raised() -> dict[str, str]:
    """Take more of everything than was given."""
    import resource

    found: dict[str, str] = {}
    for name in (name for name in dir(resource) if name.startswith("RLIMIT_")):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY:
            continue
        try:
            resource.setrlimit(kind, (hard, hard + 1))
            found[name] = "ok"
        except ValueError:  # what Python makes of EPERM
            found[name] = "EPERM"

    def spared() -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")

    found["nice"] = said(lambda: os.nice(-5))
    found["oom_score_adj"] = said(spared)
    found["SCHED_FIFO"] = said(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
    return found


def terminal_driven(ioctl: int) -> dict[str, str]:
    """Type into a terminal of the session's own, change its discipline, and open the one that there is not."""
    sti, linux, discipline, high = 0x5412, 0x541C, 0x5423, 1 << 32
    other, own = pty.openpty()
    found = {
        "TIOCSTI": call(ioctl, own, sti, b"x"),
        "TIOCSTI with a high bit": call(ioctl, own, sti | high, b"x"),
        "TIOCLINUX": call(ioctl, own, linux, b"\2"),
        "TIOCSETD": call(ioctl, own, discipline, bytes(4)),
    }
    for fd in (0, 1, 2):
        found[f"TIOCSTI on {fd}"] = call(ioctl, fd, sti, b"x")
    os.close(other)
    os.close(own)
    found["/dev/tty"] = said(lambda: os.close(os.open("/dev/tty", os.O_RDWR)))
    return found


# --- The host's side --------------------------------------------------------------------------------------------------


def host_uids(pid: int) -> set[int]:
    """The real, effective, saved and file system uid of a process, as the host sees them."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return {int(uid) for line in lines if line.startswith("Uid:") for uid in line.split()[1:]}


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, links not followed."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else "" for path in folder.rglob("*")}


class KeyedClient(ExecutionClient):
    """A client that asks for a key without looking at the key's folder first, as another process's would."""

    key = ""

    @property
    def session_key(self) -> str:
        return self.key


# --- A: host files ----------------------------------------------------------------------------------------------------

NOT_INSIDE = [
    *("/etc/shadow", "/etc/hostname", "/etc/machine-id", "/etc/ssh", "/root", "/root/.ssh/id_rsa", "/home", "/var"),
    *("/run", "/boot", "/mnt", "/media", "/srv", "/sys", "/oldroot", "/newroot", "/.old"),
    *("/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/user"),
]
# An image has files of its own at the usual places; a container's engine adds some of these.
SOCKETS = ["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/user"]
NOT_IN_A_CONTAINER = ["/run", "/sys", "/oldroot", "/newroot", "/.old", "/.dockerenv", "/dev/mqueue", *SOCKETS]
IN_ROOT = {"app", "bin", "dev", "etc", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "opt", "proc", "tmp", "usr"}
IN_ETC = {"alternatives", "fonts", "group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd"}


def check_image(found: list[list[str]], folders: set[str]) -> None:
    """What is mounted is the session's own or of the image, and each part of the image is at its own place."""
    shown = {place: (device, root) for place, device, root in found}
    own = {"/", "/dev", "/dev/pts", "/dev/shm", "/proc", "/tmp", *DOCKER_FILES, *folders}
    # Of /proc only what is covered: keyrings, which no namespace divides.
    own |= {place for place in shown if place.startswith("/dev/")} | {"/proc/keys", "/proc/key-users"}
    assert own <= shown.keys()
    image = shown["/usr"][0]
    assert image not in {shown[place][0] for place in own}
    others = shown.keys() - own
    assert {place: shown[place] for place in others} == {place: (image, place) for place in others}


# What Docker writes for each container of its.
DOCKER_FILES = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"]


def check_docker_files(found: list[str]) -> None:
    """They tell nothing of the host: neither its name nor whom it asks for names."""
    name, hosts, resolving = found
    assert name == "actbox\n"
    assert {line.split()[0] for line in hosts.splitlines()} <= {"127.0.0.1", "::1", "fe00::", "fe00::0", "ff00::"} | {
        f"{part}::{number}" for part in ("ff00", "ff02") for number in range(4)
    }
    assert socket.gethostname() not in hosts.split()
    assert {line for line in resolving.splitlines() if not line.startswith("#")} <= {"nameserver 127.0.0.1", "search ."}


async def test_nothing_of_the_host_is_seen_but_what_is_shown(
    container: CodeExecutionContainer, executor: CodeExecutor, tmp_path: Path, engine: str
) -> None:
    """A1, C9: files of the system, of its users, of this test, of the workspace by its place on the host."""
    canary = tmp_path / "canary"
    canary.write_text("of the host", encoding="ascii")
    paths = [str(canary), str(tmp_path), str(container.workspace.path)]
    paths += NOT_IN_A_CONTAINER if engine == "docker" else NOT_INSIDE
    assert await inside(executor, opened, paths) == dict.fromkeys(paths, "ENOENT")
    assert set(await inside(executor, listed, "/app")) == {"skills"}
    if engine == "docker":
        folders = {"/app/skills/shared", f"/app/skills/private/{executor.key}"}
        check_image(await inside(executor, mounted), folders)
        check_docker_files(await inside(executor, texts, DOCKER_FILES))
        return
    assert set(await inside(executor, listed, "/")) <= IN_ROOT
    assert set(await inside(executor, listed, "/etc")) <= IN_ETC
    assert await inside(executor, users) == ["root", "sandbox", "nobody"]


async def test_the_system_cannot_be_written(executor: CodeExecutor, engine: str) -> None:
    """A2, A32: what is shown of the system is read-only, new names and old ones."""
    paths = ["/usr/x", "/usr/bin/x", "/etc/x", "/opt/x", "/opt/actbox/x"]
    paths += ["/var/tmp/x", "/home/x"] if engine == "docker" else ["/opt/actbox/env/x", "/opt/actbox/guest/x"]
    assert set((await inside(executor, created, paths)).values()) == {"EROFS"}
    assert set((await inside(executor, changed, "/usr/bin/env")).values()) <= {"EROFS", "EPERM", "EACCES", "EXDEV"}
    programs = await inside(executor, written_programs)
    assert set(programs.values()) <= {"EROFS", "EACCES", "ETXTBSY", "EPERM"}
    # With Docker the guest's code is in memory alone.
    assert (len(programs) > 4) is (engine == "bubblewrap")


async def test_the_root_folder_cannot_be_written(executor: CodeExecutor) -> None:
    """A3: neither / nor the folders above the session's own."""
    paths = ["/x", "/app/x", "/app/skills/x", "/app/skills/private/x", "/proc/x"]
    found = await inside(executor, created, paths)
    assert found.pop("/proc/x") in ("ENOENT", "EACCES")
    assert found.pop("/proc/x/") in ("ENOENT", "EACCES")
    assert set(found.values()) == {"EROFS"}


async def test_the_device_folder_cannot_be_written(executor: CodeExecutor) -> None:
    """A4: no file, no folder, no device in /dev, beside /dev/shm."""
    found = await inside(executor, created, ["/dev/x", "/dev/pts/x"])
    assert (found["/dev/x"], found["/dev/x/"]) == ("EROFS", "EROFS")
    assert "ok" not in found.values()
    assert await inside(executor, created, ["/dev/shm/x"]) == {"/dev/shm/x": "ok", "/dev/shm/x/": "ok"}


async def test_shared_skills_cannot_be_written(container: CodeExecutionContainer, executor: CodeExecutor) -> None:
    """A5: every way to change a shared skill is refused, and the host's file is as it was."""
    skill = container.workspace.shared_skills_path / f"{executor.key}.py".replace("-", "_")
    skill.write_text("answer = 42\n", encoding="ascii")
    skill.chmod(0o666)
    place = f"/app/skills/shared/{skill.name}"
    before = tree(container.workspace.shared_skills_path)
    found = await inside(executor, changed, place)
    assert found.pop("link") in ("EROFS", "EPERM")
    assert set(found.values()) == {"EROFS"}
    assert set((await inside(executor, created, ["/app/skills/shared/x"])).values()) == {"EROFS"}
    assert tree(container.workspace.shared_skills_path) == before
    assert skill.read_text(encoding="ascii") == "answer = 42\n"
    assert (await executor.execute(f"from {skill.stem} import answer; print(answer)")).text == "42"


async def test_another_keys_folder_is_not_there(container: CodeExecutionContainer, make_executor: Make) -> None:
    """A6: a session sees the folder of its own key alone, by no path another's."""
    async with make_executor() as one, make_executor() as other:
        await one.execute("open('secret.txt', 'w').write('of one')")
        assert (one.working_dir / "secret.txt").read_text(encoding="ascii") == "of one"
        assert await inside(other, listed, "..") == [other.key]
        assert await inside(other, listed, "/app/skills/private") == [other.key]
        places = [f"/app/skills/private/{one.key}", f"../{one.key}", f"/app/images/{one.key}"]
        places += [f"/proc/{root}/root/app/skills/private/{one.key}" for root in ("self", "1", "thread-self")]
        found = await inside(other, opened, [f"{place}/secret.txt" for place in places] + places)
        assert set(found.values()) <= {"ENOENT", "EACCES"}
        assert (await other.execute("import os; print(os.getcwd())")).text == f"/app/skills/private/{other.key}"
    assert container.workspace.private_skills_path.joinpath(other.key).is_dir()


async def test_a_mount_cannot_be_taken_off_or_covered(executor: CodeExecutor) -> None:
    """A7: no mount point can be detached, made writable, or covered."""
    found = await inside(executor, mounts_undone, NUMBERS)
    assert len(found) > 10
    assert set(found.values()) == {"EPERM"}
    assert set((await inside(executor, created, ["/usr/x", "/x"])).values()) == {"EROFS"}


async def test_no_namespace_can_be_made_to_mount_in(executor: CodeExecutor) -> None:
    """A8: the way round A7, by a user namespace of the session's own, is refused at its first step."""
    found = await inside(executor, mounts_in_own_namespace, NUMBERS)
    assert found == dict.fromkeys(found, "EPERM EPERM")


BAD_KEYS = [
    *("", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0b", "a\n", "\x1b[2J", "\u202egnp", "．．／x"),
    *(unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "%2e%2e", "~", "-rf", "a " * 200),
    *("\udc80", "CON", "con", "a.", " a", "a ", "_a", "a" * 65),
]


@pytest.mark.parametrize("bad", BAD_KEYS, ids=ascii)
async def test_a_key_that_is_no_plain_name_is_refused(container: CodeExecutionContainer, bad: str) -> None:
    """A9: before anything of the file system is looked at, on each of the three ways to a session."""
    before = tree(container.workspace.path)
    with pytest.raises(InvalidKey) as caught:
        CodeExecutor(bad, container.workspace, container.port)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(InvalidKey):
        await sessions.connect(container.port, "localhost", key=bad, token=None, heartbeat=10)
    with pytest.raises((ConnectionError, ValueError)):
        await sessions._connect_tcp(container.port, "127.0.0.1", key=bad, token=container.token, heartbeat=10)
    assert tree(container.workspace.path) == before


async def test_keys_that_differ_in_case_are_two(container: CodeExecutionContainer) -> None:
    """A9: 'Bob' is not 'bob'."""
    if (container.workspace.path.parent / container.workspace.path.name.upper()).exists():
        lacking("this file system does not tell them apart")
    async with (
        CodeExecutor("Bob", container.workspace, container.port) as upper,
        CodeExecutor("bob", container.workspace, container.port) as lower,
    ):
        await upper.execute("open('x', 'w').close()")
        assert await inside(lower, listed, ".") == []


async def test_a_key_is_no_prefix_of_another(container: CodeExecutionContainer, key: str) -> None:
    """A10: 'data' has nothing of 'data-secret' (CVE-2026-35397)."""
    async with (
        CodeExecutor(f"{key}-secret", container.workspace, container.port) as longer,
        CodeExecutor(key, container.workspace, container.port) as shorter,
    ):
        await longer.execute("open('x', 'w').close()")
        paths = [f"../{key}-secret/x", f"/app/skills/private/{key}-secret/x"]
        assert await inside(shorter, opened, paths) == dict.fromkeys(paths, "ENOENT")


async def test_a_link_that_a_session_left_leads_no_later_start_out(
    workspace_path: Path, tmp_path: Path, engine: str
) -> None:
    """A11: nothing is made or mounted below what a session may write.

    A bubblewrap before 0.12 follows links there, out to the host (CVE-2026-87766).
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    left: list[str] = []
    names = ["app", "dev", "etc", "key", "one", "opt", "private", "proc", "shared", "skills", "sub", "tmp"]
    for _ in range(2):
        async with (
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            places = [place for place, _, _ in await inside(executor, mounted)]
            assert [place for place in places if place.startswith("/app/skills/private/one/")] == []
            left = await inside(executor, listed, ".")
            code = f"import os\nfor name in {names}: os.symlink(f'/oldroot{outside}', name)"
            if not left:
                await executor.execute(code)
    assert left == names
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("target", ["/etc", "/", "..", "../../images", "nowhere"])
async def test_a_link_in_the_place_of_a_keys_folder_is_refused(
    container: CodeExecutionContainer, key: str, target: str
) -> None:
    """A12: an earlier session, or anyone, left a symbolic link where the session's folder should be."""
    private = container.workspace.private_skills_path
    private.joinpath(key).symlink_to(target)
    with pytest.raises(WorkspaceError):
        await CodeExecutor(key, container.workspace, container.port).connect()
    client = KeyedClient(container.port)
    client.key = key
    with pytest.raises(WorkspaceError):
        await client.connect()
    with pytest.raises(ConnectionError):
        await sessions._connect_tcp(container.port, "127.0.0.1", key=key, token=container.token, heartbeat=10)
    assert private.joinpath(key).readlink() == Path(target)


async def test_a_folder_that_became_a_link_while_the_container_runs_is_refused(
    container: CodeExecutionContainer, key: str, tmp_path: Path
) -> None:
    """A12: the check is made for every session, not once."""
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        await executor.execute("open('mine', 'w').close()")
    folder = container.workspace.private_skills_path / key
    folder.rename(folder.with_name(f"{key}-old"))
    (tmp_path / "canary").touch()
    folder.symlink_to(tmp_path)
    with pytest.raises(WorkspaceError):
        await CodeExecutor(key, container.workspace, container.port).connect()
    folder.unlink()
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        assert await inside(executor, listed, ".") == []


async def test_a_link_that_comes_after_the_hosts_check_is_refused_inside(
    container: CodeExecutionContainer, key: str, make_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A12: the race between check and use; with the host's check taken away the guest's own still holds."""
    async with make_executor() as other:
        await other.execute("open('secret', 'w').close()")
        container.workspace.private_skills_path.joinpath(key).symlink_to(other.key)
        monkeypatch.setattr(Workspace, "prepare_key", mock.Mock())
        client = KeyedClient(container.port)
        client.key = key
        with pytest.raises(SandboxUnavailable) as caught:
            await client.connect()
        assert caught.value.layer == "folders"


@pytest.mark.parametrize("link", ["skills", "skills/private", "skills/shared", "images"])
async def test_a_workspace_whose_folders_are_links_is_refused(
    workspace_path: Path, tmp_path: Path, engine: str, link: str
) -> None:
    """A12: no container starts over one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    place = workspace_path / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    with pytest.raises(WorkspaceError):
        await container.run()
    assert list(outside.iterdir()) == []


async def test_no_file_of_another_mount_gets_a_name_among_the_sessions_own(
    container: CodeExecutionContainer, executor: CodeExecutor
) -> None:
    """A21: what is shown read-only would be writable under it."""
    skill = container.workspace.shared_skills_path / f"{executor.key}.py"
    skill.touch()
    paths = [f"/app/skills/shared/{skill.name}", "/etc/passwd", "/usr/bin/env", "/proc/self/exe", "/dev/null"]
    assert set((await inside(executor, linked, paths)).values()) <= {"EXDEV", "EPERM"}
    assert await inside(executor, listed, ".") == []


async def test_no_set_id_file_can_be_made(container: CodeExecutionContainer, executor: CodeExecutor) -> None:
    """A22: the workspace is the host's, and a set-uid program in it would be the host's too."""
    found = await inside(executor, set_id_files, NUMBERS)
    assert found.pop("openat2") == "ENOSYS"
    assert set(found.values()) == {"EPERM"}
    modes = {path: path.lstat().st_mode for path in executor.working_dir.rglob("*")}
    assert len(modes) == 2
    assert not any(mode & (stat.S_ISUID | stat.S_ISGID) for path, mode in modes.items() if path.is_file())
    owner = container.workspace.path.stat().st_uid
    assert {path.lstat().st_uid for path in modes} == {owner}


def kinds(found: list[dict[str, Any]]) -> list[str]:
    names: dict[int, str] = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device"}
    return sorted(names.get(entry["kind"], str(entry["link"])) for entry in found if "anon_inode" not in entry["link"])


def check_descriptors(found: list[dict[str, Any]]) -> None:
    by_number = {entry["fd"]: entry for entry in found}
    assert by_number[0]["link"] == "/dev/null"
    assert not any(stat.S_ISDIR(entry["kind"]) for entry in found)
    # One stream to the host, one socket to the watcher, and the pipes behind standard output and error, both ends.
    assert kinds(found) == ["device", "pipe", "pipe", "pipe", "pipe", "socket", "socket"]
    # A socket of the host's network could be disconnected and connected to anywhere from here.
    assert [(entry["family"], entry["name"]) for entry in found if "family" in entry] == 2 * [(socket.AF_UNIX, "")]


async def test_a_session_holds_no_descriptor_but_its_own(
    workspace_path: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A27, A28: no folder, no socket of the host's network; even if the host is careless with its own descriptors."""
    careless = [os.open(place, os.O_RDONLY) for place in ("/", tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        careless.append(os.dup(server.fileno()))
        for fd in careless:
            os.set_inheritable(fd, True)
        try:
            async with (
                CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
                CodeExecutor("one", container.workspace, container.port) as executor,
            ):
                check_descriptors(await inside(executor, descriptors))
                assert await inside(executor, opened_from_descriptors, "etc/passwd") == ["EBADF", "ENOTDIR"]
        finally:
            for fd in careless:
                os.close(fd)


async def test_a_session_over_tcp_holds_no_socket_of_the_network_either(container: CodeExecutionContainer) -> None:
    """A27: the connection that a client of another process makes ends at the gateway, not in the session."""
    session = await sessions._connect_tcp(container.port, "127.0.0.1", key=None, token=container.token, heartbeat=10)
    try:
        source = "".join(inspect.getsource(part) for part in (said, descriptors))
        await session.send(
            {"type": "execute", "id": 1}, f"{PRELUDE}{source}\nprint(json.dumps(descriptors()))".encode()
        )
        text = b""
        while (frame := await session.receive()) is not None and frame.header["type"] != "execute_reply":
            text += frame.payload if frame.header["type"] == "stream" else b""
        check_descriptors(json.loads(text))
    finally:
        await session.close()


async def test_no_process_tells_places_of_the_host(container: CodeExecutionContainer, executor: CodeExecutor) -> None:
    """A29: neither by its command line nor by its root, folder or descriptors."""
    workspace = str(container.workspace.path)
    home = str(Path.home())
    for entry in (await inside(executor, readable_processes)).values():
        for text in entry.values():
            assert workspace not in text
            assert len(home) < 4 or home not in text.replace("HOME=/tmp", "")
    found = await inside(executor, other_process, 1)
    assert found.pop("cmdline") == "ok"  # as for every process of the machine; looked at above
    assert set(found.values()) <= {"EACCES", "EPERM"}


PNG = b"\x89PNG\r\n\x1a\n"


async def test_the_host_runs_nothing_that_a_session_left(
    workspace_path: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A30: whatever its name, in every call that has to do with the folder, from within that folder."""
    ran = tmp_path / "ran"
    names = ["sitecustomize.py", "usercustomize.py", "conftest.py", "__init__.py", "actbox.py", "json.py", "x.pth"]
    planted = f"import os; open({str(ran)!r}, 'w').close()"
    plant = f"for name in {names}: open(name, 'w').write({planted!r})"
    local = tmp_path / "local"
    local.write_bytes(b"x")
    for _ in range(2):
        async with (
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            await executor.execute(plant)
            monkeypatch.chdir(executor.working_dir)
            await executor.download_directory("/app/skills/private/one", tmp_path / "out")
            await executor.upload_file("/app/skills/private/one/up", local)
            await executor.delete_file("/app/skills/private/one/up")
            png = f"from IPython.display import Image; Image(data={PNG!r}, format='png')"
            assert len((await executor.execute(png)).images) == 1
    assert set(names) <= tree(workspace_path / "skills" / "private" / "one").keys()
    files = [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
    assert [file for file in [*files, *sys.path] if file.startswith(str(workspace_path))] == []
    assert not ran.exists()


# --- B: secrets -------------------------------------------------------------------------------------------------------

VARIABLES = {
    *("PATH", "HOME", "USER", "LANG", "SHELL", "PWD", "MPLBACKEND", "MPLCONFIGDIR", "MALLOC_ARENA_MAX"),
    *("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
}


def check_variables(found: dict[str, str], engine: str) -> None:
    if engine == "docker":
        assert found.pop("HOSTNAME") == "actbox"
        assert found.keys() <= VARIABLES | image_variables()
    else:
        assert found.keys() <= VARIABLES


async def test_the_environment_is_a_list_of_our_own(executor: CodeExecutor, engine: str) -> None:
    """B1: what the container was asked to set, what every session has, and what the image sets."""
    found = await inside(executor, environment)
    assert found.pop("GREETING") == "hello"
    check_variables(found, engine)


async def test_a_secret_in_the_hosts_environment_is_nowhere_inside(
    workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2, B3: not in any process's environment or command line, nor in the session's memory."""
    secret = secrets.token_hex(16)
    monkeypatch.setenv("SECRET_TOKEN", secret)
    async with (
        CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
        CodeExecutor("one", container.workspace, container.port) as executor,
    ):
        assert "SECRET_TOKEN" not in await inside(executor, environment)
        for entry in (await inside(executor, readable_processes)).values():
            assert not any(secret in text or "SECRET_TOKEN" in text for text in entry.values())
        assert await inside(executor, memory_matches, "SECRET_TOKEN=[0-9a-f]{32}") == []
        # The same search does find what is there.
        assert await inside(executor, memory_matches, "MALLOC_ARENA_MAX=[0-9]") != []


async def test_a_crash_starts_no_program_of_the_host(executor: CodeExecutor) -> None:
    """B7: no core is written, and none handed to the host's core handler, which runs as root outside.

    A handler behind a pipe is started although the limit is 0; 1 is the value that the kernel takes as "no handler".
    """
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    assert (await executor.execute(code)).text == "(1, 1)"


async def test_no_keyring_can_be_asked(executor: CodeExecutor) -> None:
    """B4: no namespace divides them, and they hold keys of the user who runs the host's side."""
    names = ["keyctl", "add_key", "request_key"]
    assert await inside(executor, calls_refused, NUMBERS, names) == dict.fromkeys(names, "EPERM")
    assert await inside(executor, texts, ["/proc/keys", "/proc/key-users"]) == ["", ""]


async def test_the_ports_token_is_in_no_session(container: CodeExecutionContainer, executor: CodeExecutor) -> None:
    """B6: with it a session could ask for the folder of any key."""
    first, rest = container.token[0], re.escape(container.token[1:])
    assert await inside(executor, memory_matches, f"[{first}]{rest}") == []
    for entry in (await inside(executor, readable_processes)).values():
        assert not any(container.token in text for text in entry.values())


@pytest.mark.parametrize("code", ["1 / 0", "import nothing_of_this_name", "%run missing.py", "!missing", "%env"])
async def test_no_traceback_tells_a_place_of_the_host(
    container: CodeExecutionContainer, executor: CodeExecutor, code: str
) -> None:
    """B7: nor does the list of variables."""
    try:
        told = (await executor.execute(code)).text or ""
    except ExecutionError as exc:
        told = f"{exc} {exc.trace} {exc!r}"
    assert told
    assert str(container.workspace.path) not in told
    assert str(Path(__file__).parents[1]) not in told


async def test_no_failure_and_no_log_tells_a_secret(workspace_path: Path, tmp_path: Path, engine: str) -> None:
    """B8: neither a variable that was passed in, nor the token of the port."""
    secret, log = secrets.token_hex(16), tmp_path / "log"
    told: list[str] = []
    async with execution_environment(
        "one", workspace_path=workspace_path, log_file=log, env_vars={"KEY": secret}, engine=engine, preload=()
    ) as environment:
        assert (await environment.executor.execute("import os; print(os.environ['KEY'][:2])")).text == secret[:2]
        for code in ("1 / 0", "import os; os._exit(1)", "open('/missing')"):
            with pytest.raises((ExecutionError, KernelDied)) as caught:
                await environment.executor.execute(code)
            told += [str(caught.value), repr(caught.value), caught.value.text or ""]
        token = environment.container.token
        told += [repr(part) for part in (environment, environment.container, environment.executor)]
    logged = await asyncio.to_thread(log.read_text, encoding="utf-8")
    assert "cell 2 failed: ZeroDivisionError" in logged
    told.append(logged)
    assert [text for text in told if secret in text or token in text] == []


# --- C: network -------------------------------------------------------------------------------------------------------

OUTSIDE = [
    *(["1.1.1.1", 443], ["8.8.8.8", 53], ["169.254.169.254", 80], ["10.0.0.1", 80], ["192.168.0.1", 80]),
    *(["2606:4700:4700::1111", 443], ["fd00:ec2::254", 80], ["fe80::1", 80]),
]


async def test_nothing_outside_can_be_reached(executor: CodeExecutor) -> None:
    """C1, C8: neither the internet, nor the local network, nor a cloud's metadata."""
    found = await inside(executor, connected, OUTSIDE)
    # EINVAL is what a link-local address without an interface gets, EAFNOSUPPORT a kernel without IPv6.
    assert {answer for name, answer in found.items() if ":" not in name} == {"ENETUNREACH"}
    assert set(found.values()) <= {"ENETUNREACH", "EADDRNOTAVAIL", "EINVAL", "EAFNOSUPPORT"}
    assert await inside(executor, interfaces) == ["lo"]


async def test_no_name_is_resolved(executor: CodeExecutor) -> None:
    """C2: no name service answers, and none can be asked."""
    names = ["x.attacker.tld", "metadata.google.internal", "example.com"]
    assert await inside(executor, resolved, names) == dict.fromkeys(names, "gaierror")


async def test_a_listener_on_the_hosts_loopback_cannot_be_reached(
    container: CodeExecutionContainer, executor: CodeExecutor
) -> None:
    """C3: the loopback inside is another one; the container's own port is on the host's too."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        with contextlib.suppress(OSError):
            servers.append(stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)))
        ports = [server.getsockname()[1] for server in servers]
        addresses = [[host, port] for port in [*ports, container.port] for host in ("127.0.0.1", "localhost", "::1")]
        addresses += [["127.1.2.3", ports[0]], ["0.0.0.0", ports[0]]]
        found = await inside(executor, connected, [address for address in addresses if address[0] != "localhost"])
        assert set(found.values()) <= {"ECONNREFUSED", "EADDRNOTAVAIL", "EAFNOSUPPORT"}
        for server in servers:
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


async def test_an_abstract_socket_of_the_host_cannot_be_reached(executor: CodeExecutor) -> None:
    """C4: those names belong to the network namespace."""
    name = f"actbox-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        server.setblocking(False)
        assert set((await inside(executor, abstract_connected, name)).values()) == {"ECONNREFUSED"}
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_virtual_machines_socket_cannot_be_made(executor: CodeExecutor) -> None:
    """C5: AF_VSOCK reaches the hypervisor past every network namespace before Linux 7.0."""
    found = await inside(executor, families)
    assert found["40"] == "EAFNOSUPPORT"


async def test_only_unix_tcp_and_udp_sockets_can_be_made(executor: CodeExecutor) -> None:
    """C6: netlink, packet, algorithm, Bluetooth, CAN, TIPC, key and all other families; raw, ping and SCTP."""
    found = await inside(executor, families)
    assert {name for name, answer in found.items() if answer == "ok"} <= {"1", "2", "10"}
    assert {found[str(number)] for number in range(1, 50) if number not in (1, 2, 10)} == {"EAFNOSUPPORT"}
    assert (found["raw"], found["ping"], found["sctp"]) == ("EPERM", "EPROTONOSUPPORT", "EPROTONOSUPPORT")


async def test_io_uring_is_refused(executor: CodeExecutor) -> None:
    """C7: it would make calls that no filter sees."""
    names = ["io_uring_setup", "io_uring_enter", "io_uring_register"]
    assert await inside(executor, calls_refused, NUMBERS, names) == dict.fromkeys(names, "EPERM")


# --- D: other sessions ------------------------------------------------------------------------------------------------


async def test_no_other_process_is_seen(make_executor: Make) -> None:
    """D1: a session sees what it started, and the process that watches it."""
    async with make_executor() as one, make_executor() as other:
        marker = f"9{secrets.randbelow(10**8):08}"
        await one.execute(f"import subprocess; child = subprocess.Popen(['sleep', '{marker}'])")
        assert marker in json.dumps(await inside(one, readable_processes))
        assert marker not in json.dumps(await inside(other, readable_processes))
        assert len(await inside(one, pids)) == len(await inside(other, pids)) + 1
        assert len(await inside(other, pids)) <= 3


async def test_killing_everything_kills_nothing_of_others(make_executor: Make) -> None:
    """D2: kill(-1) and every single number, in one session; the other, and the container, answer on."""
    async with make_executor() as one, make_executor() as other:
        await other.execute("x = 42")
        with contextlib.suppress(KernelDied):
            assert await inside(one, killed_all) == "alive"
        assert (await other.execute("print(x)")).text == "42"
        assert (await one.execute("print(1)")).text == "1"
        async with make_executor() as third:
            assert (await third.execute("print(3)")).text == "3"


async def test_no_process_can_be_traced(make_executor: Make) -> None:
    """D3: neither the watcher, nor an own child, nor oneself by another."""
    async with make_executor() as one:
        child = int(
            (await one.execute("import subprocess; p = subprocess.Popen(['sleep', '99']); print(p.pid)")).text or 0
        )
        assert set((await inside(one, traced, NUMBERS, child)).values()) == {"EPERM"}


async def test_other_sessions_processes_cannot_be_looked_into(make_executor: Make) -> None:
    """D4: by the number that the host knows them by, or any other."""
    before = sandboxed(os.getpid())
    async with make_executor() as one, make_executor() as other:
        new = sandboxed(os.getpid()) - before
        assert len(new) >= 4
        seen = await inside(other, pids)
        for pid in new - set(seen):
            assert set((await inside(other, other_process, pid)).values()) == {"ENOENT"}
        # And those that are seen are the session's own: each session's numbers begin anew.
        assert await inside(other, pids) == await inside(one, pids)


async def test_no_call_reaches_into_another_process(make_executor: Make) -> None:
    """D5: memory, descriptors and the like of others."""
    async with make_executor() as one:
        child = int(
            (await one.execute("import subprocess; p = subprocess.Popen(['sleep', '99']); print(p.pid)")).text or 0
        )
        assert set((await inside(one, reached_into, NUMBERS, child)).values()) == {"EPERM"}


# System V objects, which no bound on memory would count.
NOT_TO_BE_HAD = dict.fromkeys(("shm", "sem", "msg"), "ENOSYS")


def check_shared(left: dict[str, str], found_by_itself: dict[str, str], found: dict[str, str]) -> None:
    """What one session could leave, finds again itself, and another one finds."""
    assert left == found_by_itself == {**dict.fromkeys(left, "ok"), **NOT_TO_BE_HAD}
    assert {name: answer for name, answer in found.items() if name in NOT_TO_BE_HAD} == NOT_TO_BE_HAD
    assert {answer for name, answer in found.items() if name not in NOT_TO_BE_HAD} == {"ENOENT", "ECONNREFUSED"}


async def test_sessions_share_no_memory_queues_or_names(make_executor: Make) -> None:
    """D6, D7: /tmp, /dev/shm, System V objects, abstract sockets and the loopback are each session's own."""
    async with make_executor() as one, make_executor() as other:
        check_shared(
            await inside(one, shared_with_others, True),
            await inside(one, shared_with_others, False),
            await inside(other, shared_with_others, False),
        )


@pytest.mark.timeout(90)
async def test_no_socket_of_the_hosts_side_has_a_name_inside(executor: CodeExecutor) -> None:
    """D8, D17, G14: there is none to connect to, to speak to the supervisor by, or to put another one in its place."""
    assert await inside(executor, sockets_seen) == []
    await executor.execute("import socket; own = socket.socket(socket.AF_UNIX); own.bind('/tmp/own'); own.listen()")
    assert await inside(executor, sockets_seen) == ["/tmp/own", "/tmp/own"]


async def test_a_session_inherits_nothing_of_those_before(make_executor: Make) -> None:
    """D9: no channel of the supervisor's, no pipe or stream of another session."""
    async with make_executor() as first, make_executor() as second, make_executor() as third:
        found = [await inside(executor, descriptors) for executor in (first, second, third)]
    links: list[str] = []
    for entries in found:
        check_descriptors(entries)
        links += {entry["link"] for entry in entries if entry["link"].startswith(("pipe:", "socket:"))}
    assert len(links) == len(set(links)) == 12


async def test_sessions_draw_different_random_numbers(make_executor: Make) -> None:
    """D10: though they are forks of one process."""
    async with make_executor() as one, make_executor() as other:
        mine, theirs = await inside(one, randoms), await inside(other, randoms)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] == theirs[name]] == []


async def test_what_a_session_spoils_is_spoiled_for_itself_alone(make_executor: Make) -> None:
    """D11: modules, builtins, paths, variables; seen neither by a session that runs nor by a later one."""
    async with make_executor() as before, make_executor() as one:
        with contextlib.suppress(ExecutionError):
            await inside(one, spoiled)
        assert (await one.execute("import math; print(math.pi)")).text == "3"
        assert await inside(before, pristine) == []
        async with make_executor() as after:
            assert await inside(after, pristine) == []


DEATHS = {
    "segfault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "kill": "import os; os.kill(os.getpid(), 9)",
    "exit": "import os; os._exit(3)",
    "illegal instruction": "import os; os.kill(os.getpid(), 4)",
}


@pytest.mark.parametrize("death", DEATHS)
async def test_a_session_that_dies_takes_nobody_with_it(make_executor: Make, death: str) -> None:
    """D12: the supervisor survives, others answer, the next session starts."""
    before = supervisors(os.getpid())
    assert before
    async with make_executor() as one, make_executor() as other:
        await other.execute("x = 42")
        with pytest.raises(KernelDied):
            await one.execute(DEATHS[death])
        assert (await other.execute("print(x)")).text == "42"
        assert (await one.execute("print('again')")).restarted
        async with make_executor() as third:
            assert (await third.execute("print(3)")).text == "3"
    assert supervisors(os.getpid()) == before


async def test_a_session_without_memory_takes_nobody_with_it(make_executor: Make) -> None:
    """D12: too much memory is the session's own error."""
    async with make_executor() as one, make_executor() as other:
        with pytest.raises(ExecutionError) as caught:
            await one.execute("x = bytearray(1 << 40)")
        assert caught.value.name == "MemoryError"
        assert (await one.execute("print(1)")).text == "1"
        assert (await other.execute("print(2)")).text == "2"


async def test_the_supervisor_cannot_be_seen_signalled_or_traced(executor: CodeExecutor, make_executor: Make) -> None:
    """D13: by its number on the host, by that in the container, or by the one that stands in its place."""
    seen = await inside(executor, pids)
    outside = sorted(sandboxed(os.getpid()) - set(seen))
    assert len(outside) >= 3
    assert await inside(executor, signalled, outside) == ["ESRCH"]
    found = await inside(executor, other_process, 1)
    assert {answer for name, answer in found.items() if name != "cmdline"} <= {"EACCES", "EPERM"}
    # The one that is seen takes no harm either: pid 1 is safe from its own namespace.
    await inside(executor, signalled, [1])
    assert (await executor.execute("print(1)")).text == "1"
    async with make_executor() as other:
        assert (await other.execute("print(2)")).text == "2"


async def test_two_sessions_of_one_key_share_its_folder_and_nothing_else(
    container: CodeExecutionContainer, key: str
) -> None:
    """D16: they race in the folder, which is said; each has its own kernel, its own /tmp and its own end."""
    async with (
        CodeExecutor(key, container.workspace, container.port) as one,
        CodeExecutor(key, container.workspace, container.port) as other,
    ):
        await one.execute("x = 1; open('shared', 'w').close(); open('/tmp/own', 'w').close()")
        found = await other.execute("import os; print('x' in globals(), os.path.exists('/tmp/own'), os.listdir())")
        assert found.text == "False False ['shared']"
        with pytest.raises(KernelDied):
            await one.execute("import os; os._exit(1)")
        assert (await other.execute("print(os.listdir())")).text == "['shared']"


async def test_other_sessions_leave_no_trace_in_proc(make_executor: Make) -> None:
    """D18: lists that the kernel keeps of everybody are the session's own, empty, or refused."""
    async with make_executor() as one, make_executor() as other:
        await one.execute("import socket; s = socket.socket(socket.AF_UNIX); s.bind('/tmp/of-one'); s.listen()")
        for path in ("/proc/net/unix", "/proc/sched_debug", "/proc/timer_list", "/proc/sysvipc/shm"):
            code = f"try: print(open('{path}').read())\nexcept OSError as exc: print(exc.errno)"
            text = (await other.execute(code)).text or ""
            assert "of-one" not in text
            assert len(text.splitlines()) <= 4
        # Of whoever this user is outside.
        assert await inside(other, texts, ["/proc/keys", "/proc/key-users"]) == ["", ""]


# --- E, F: bounds and terminals ---------------------------------------------------------------------------------------


async def test_no_bound_can_be_raised(executor: CodeExecutor) -> None:
    """E19: nor can a session go first, or be spared when memory is short."""
    found = await inside(executor, bounds_raised)
    assert len(found) > 8
    assert set(found.values()) <= {"EPERM", "EACCES", "EROFS"}


async def test_no_terminal_can_be_driven(executor: CodeExecutor) -> None:
    """F1, F2, F3, F4: there is none, and of one's own nothing can be typed into (CVE-2017-5226, CVE-2019-10063)."""
    found = await inside(executor, terminal_driven, NUMBERS["ioctl"])
    assert found.pop("/dev/tty") == "ENXIO"
    assert set(found.values()) == {"EPERM"}


# --- H: privileges and the kernel's surface ---------------------------------------------------------------------------

# Ours outside and inside; Docker puts on a third one that is made of the same rules.
FILTERS = {"bubblewrap": "2", "docker": "3"}
NO_CAPABILITIES = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0000000000000000")


@pytest.mark.parametrize("pid", ["self", "1"])
async def test_a_session_has_no_rights_and_can_get_none(executor: CodeExecutor, pid: str, engine: str) -> None:
    """H1: the exact values, of the kernel and of its watcher."""
    found = await inside(executor, status, pid)
    assert {name: found[name] for name in NO_CAPABILITIES} == NO_CAPABILITIES
    assert (found["NoNewPrivs"], found["Seccomp"], found.get("Seccomp_filters", FILTERS[engine])) == (
        *("1", "2"),
        FILTERS[engine],
    )
    assert (found["Uid"].split(), found["Gid"].split()) == (["1000"] * 4, ["1000"] * 4)
    # An ordinary user cannot give up supplementary groups: they stay, as groups without a name.
    assert set(found["Groups"].split()) <= {"1000", "65534"}


async def test_no_program_gives_rights(executor: CodeExecutor) -> None:
    """H2: set-uid programs of the system run as the session's user."""
    assert set((await inside(executor, set_id_programs_run)).values()) <= {1000}
    assert (await executor.execute("import os; print(os.getresuid())")).text == "(1000, 1000, 1000)"


async def test_no_namespace_can_be_made_or_entered(executor: CodeExecutor) -> None:
    """H3: by unshare, clone, clone3 and setns."""
    found = await inside(executor, namespaces_left, NUMBERS)
    assert found.pop("clone3") == "ENOSYS"
    assert {name: answer for name, answer in found.items() if answer != "EPERM"} == {}


async def test_the_mount_calls_are_refused(executor: CodeExecutor) -> None:
    """H4: the old ones and the new ones."""
    old = ["mount", "umount2", "pivot_root", "chroot", "statmount", "listmount"]
    new = ["fsopen", "fsconfig", "fsmount", "fspick", "open_tree", "move_mount", "mount_setattr"]
    expected = {**dict.fromkeys(old, "EPERM"), **dict.fromkeys(new, "ENOSYS")}
    assert await inside(executor, calls_refused, NUMBERS, [*old, *new]) == expected


ATTACK_SURFACE = [
    *("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "io_uring_setup", "io_uring_enter"),
    *("io_uring_register", "kcmp", "syslog", "name_to_handle_at", "open_by_handle_at", "modify_ldt", "vmsplice"),
    *("move_pages", "memfd_secret", "process_vm_readv", "process_vm_writev", "ptrace", "pidfd_getfd", "fanotify_init"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "quotactl", "acct", "swapon"),
    *(
        "swapoff",
        "reboot",
        "settimeofday",
        "clock_settime",
        "iopl",
        "ioperm",
        "mbind",
        "set_mempolicy",
        "setdomainname",
    ),
]


async def test_the_kernels_attack_surface_is_closed(executor: CodeExecutor) -> None:
    """H5: the calls that a Python session never needs."""
    names = [name for name in ATTACK_SURFACE if name in NUMBERS]
    assert len(names) > 30
    assert await inside(executor, calls_refused, NUMBERS, names) == dict.fromkeys(names, "EPERM")
    assert await inside(executor, personalities, NUMBERS["personality"]) == ["ok", "EPERM", "EPERM"]


async def test_the_kernels_settings_cannot_be_written(executor: CodeExecutor) -> None:
    """H7: /proc/sys, sysrq, and what shows the kernel's memory."""
    found = await inside(executor, kernel_settings)
    assert {
        path: answer for path, answer in found.items() if answer not in ("EACCES", "ENOENT", "EROFS", "EPERM")
    } == {}


async def test_there_are_no_devices_but_the_harmless_ones(executor: CodeExecutor) -> None:
    """H8: the exact list."""
    expected = [
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
    ]
    assert [name for name in await inside(executor, devices) if name != "core"] == expected


async def test_nothing_in_the_sandbox_is_root_on_the_host(
    container: CodeExecutionContainer, executor: CodeExecutor
) -> None:
    """H9: seen from the host, and by the session's own map."""
    found = await inside(executor, status, "self")
    assert found["NSpid"].split()[-1] == found["Pid"]
    uids = {uid for pid in sandboxed(os.getpid()) for uid in host_uids(pid)}
    assert uids
    assert 0 not in uids
    for kind in ("uid", "gid"):
        mapped = ((await executor.execute(f"print(open('/proc/self/{kind}_map').read())")).text or "").split()
        assert len(mapped) == 3
        assert (mapped[0], mapped[2]) == ("1000", "1")
        assert mapped[1] != "0"
    assert container.isolation in ("nested namespaces", "one sandbox per session")


# --- H14: without a layer the case fails ------------------------------------------------------------------------------


# Where Landlock holds too it is taken away as well; `test_landlock` shows what it does alone.
WITHOUT_LANDLOCK = ("landlock.py", r"    abi = min\(offered\(\), _ABI_LOG\)\n", "    abi = 0\n")


class Mutant(NamedTuple):
    """The guest with one layer less, and what then is no longer refused."""

    file: str
    pattern: str
    new: str
    broken: Callable[[CodeExecutor], Any]
    landlock_holds: bool = False


async def _root_written(executor: CodeExecutor) -> bool:
    return (await inside(executor, created, ["/x"]))["/x"] == "ok"


async def _dev_written(executor: CodeExecutor) -> bool:
    return (await inside(executor, created, ["/dev/x"]))["/dev/x"] == "ok"


async def _namespace_made(executor: CodeExecutor) -> bool:
    return (await inside(executor, namespaces_left, NUMBERS))["unshare user"] == "ok"


async def _has_capabilities(executor: CodeExecutor) -> bool:
    return int((await inside(executor, status, "self"))["CapEff"], 16) != 0


async def _set_uid_made(executor: CodeExecutor) -> bool:
    return (await inside(executor, set_id_files, NUMBERS))["chmod setuid"] == "ok"


async def _watcher_opened(executor: CodeExecutor) -> bool:
    return (await inside(executor, other_process, 1))["mem to write"] == "ok"


async def _others_seen(executor: CodeExecutor) -> bool:
    return len(await inside(executor, pids)) > 3


async def _more_descriptors(executor: CodeExecutor) -> bool:
    return len(kinds(await inside(executor, descriptors))) > 7


async def _other_key_seen(executor: CodeExecutor) -> bool:
    return "one" in await inside(executor, listed, ".")


async def _tmp_shared(executor: CodeExecutor) -> bool:
    return (await inside(executor, opened, ["/tmp/of-one"]))["/tmp/of-one"] == "ok"


async def _same_random(executor: CodeExecutor) -> bool:
    async with CodeExecutor("two", executor.workspace, executor.port) as other:
        return (await inside(other, randoms))["numpy"] == (await inside(executor, randoms))["numpy"]


async def _link_followed(executor: CodeExecutor) -> bool:
    (executor.workspace.private_skills_path / "link").symlink_to("one")
    client = KeyedClient(executor.port)
    client.key = "link"
    with mock.patch.object(Workspace, "prepare_key"):
        async with client:
            return "secret" in await inside(client, listed, ".")


MUTANTS = {
    "read-only root (A3)": Mutant("isolation.py", r'    _readonly\("/"\)\n', "", _root_written, landlock_holds=True),
    "read-only /dev (A4)": Mutant("isolation.py", r"    _readonly\(dev\)\n", "", _dev_written, landlock_holds=True),
    "one key's folder (A6)": Mutant(
        "isolation.py", r"_open_folder\(bind.*\)\n", '_open_folder(bind["target"], None)\n', _other_key_seen
    ),
    "inner filter (A8, H3)": Mutant("isolation.py", r'seccomp\.install\("inner"\)', "pass", _namespace_made),
    "links not followed (A12)": Mutant("isolation.py", r" \| os\.O_NOFOLLOW", "", _link_followed),
    "rule of set-id modes (A22)": Mutant("seccomp.py", r'    "chmod": .*\n', "", _set_uid_made),
    "closed descriptors (A27, D9)": Mutant(
        "kernel.py", r"for fd in \[\*sorted.*\]:", "for fd in ():", _more_descriptors
    ),
    "watcher not dumpable (A29, D13)": Mutant(
        "session.py", r"isolation\.set_dumpable\(.*False\)", "pass", _watcher_opened, landlock_holds=True
    ),
    "fresh /proc (D1, D4)": Mutant(
        "isolation.py",
        r'_mount\("fresh /proc".*\)',
        '_mount("old /proc", "/proc", f"{NEW_ROOT}/proc", None, MS_BIND | MS_REC, None)',
        _others_seen,
    ),
    "own /tmp (D7)": Mutant(
        "isolation.py",
        r'_mount\("/tmp", .*\)',
        '_mount("/tmp", "/tmp", tmp, None, MS_BIND | MS_REC, None)',
        _tmp_shared,
    ),
    "new seeds (D10)": Mutant("kernel.py", r"        numpy_random\.seed\(\)\n", "        pass\n", _same_random),
    "capability drop (H1)": Mutant("isolation.py", r"    drop_capabilities\(\)\n", "    pass\n", _has_capabilities),
}


@pytest.mark.parametrize("layer", MUTANTS)
async def test_without_the_layer_the_attempt_succeeds(
    layer: str,
    change_guest: Callable[[str, str, str], None],
    workspace_path: Path,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H14: each of these is refused above; here its layer alone is missing."""
    mutant = MUTANTS[layer]
    preload = ("numpy.random",) if "seeds" in layer else ()
    for module in preload:
        pytest.importorskip(module)
    change_guest(mutant.file, mutant.pattern, mutant.new)
    if mutant.landlock_holds:
        change_guest(*WITHOUT_LANDLOCK)
    if engine == "docker" and "set-id" in layer:
        # The rule is in Docker's filter too.
        policies = {stage: {**policy, "chmod": ()} for stage, policy in seccomp.POLICIES.items()}
        monkeypatch.setattr(seccomp, "POLICIES", policies)
    async with CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=preload) as container:
        assert container.isolation == "nested namespaces"
        await container.warmed()
        async with (
            CodeExecutor("one", container.workspace, container.port) as one,
            CodeExecutor("other", container.workspace, container.port) as other,
        ):
            await one.execute("open('/tmp/of-one', 'w').close(); open('secret', 'w').close()")
            assert await mutant.broken(other)


# --- Docker's own layers ----------------------------------------------------------------------------------------------


def _secured(option: str, new: list[str]) -> Callable[[dict[str, Any]], None]:
    """Puts others in the place of a security option."""

    def change(body: dict[str, Any]) -> None:
        options: list[str] = body["HostConfig"]["SecurityOpt"]
        assert any(one.startswith(option) for one in options)
        options[:] = [one for one in options if not one.startswith(option)] + new

    return change


def _host_config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["HostConfig"].update(changes)


def _writable(body: dict[str, Any]) -> None:
    for found in body["HostConfig"]["Mounts"]:
        found["ReadOnly"] = found["ReadOnly"] and found["Target"] != "/app/skills/shared"


def _one_more_mount(body: dict[str, Any]) -> None:
    body["HostConfig"]["Mounts"].append({"Type": "bind", "Source": "/tmp", "Target": "/mnt", "ReadOnly": True})


def _uts_of_the_host(body: dict[str, Any]) -> None:
    del body["Hostname"]
    body["HostConfig"]["UTSMode"] = "host"


def _other_entrypoint(body: dict[str, Any]) -> None:
    body["Entrypoint"][-1] = f"pass\n{body['Entrypoint'][-1]}"


DEVICE = {"PathOnHost": "/dev/null", "PathInContainer": "/dev/x", "CgroupPermissions": "rwm"}
# What Docker makes of a container otherwise than it is asked to, by the option that must be named.
OTHERWISE: dict[str, Callable[[dict[str, Any]], None]] = {
    "Privileged": _host_config(Privileged=True),
    "ReadonlyRootfs": _host_config(ReadonlyRootfs=False),
    "CapAdd": _host_config(CapAdd=["NET_RAW"]),
    "CapDrop": _host_config(CapDrop=[]),
    "CapDrop in part": _host_config(CapDrop=["NET_RAW"]),
    "SecurityOpt without no-new-privileges": _secured("no-new-privileges", []),
    "SecurityOpt without the profile": _secured("seccomp=", []),
    "SecurityOpt with no filter": _secured("seccomp=", ["seccomp=unconfined"]),
    "SecurityOpt with another filter": _secured("seccomp=", ['seccomp={"defaultAction":"SCMP_ACT_ALLOW"}']),
    "SecurityOpt with one more": lambda body: body["HostConfig"]["SecurityOpt"].append("apparmor=unconfined"),
    "NetworkMode": _host_config(NetworkMode="host"),
    "PidMode": _host_config(PidMode="host"),
    "IpcMode": _host_config(IpcMode="host"),
    "UTSMode": _uts_of_the_host,
    "UsernsMode": _host_config(UsernsMode="host"),
    "CgroupnsMode": _host_config(CgroupnsMode="host"),
    "Memory": _host_config(Memory=0, MemorySwap=0),
    "MemorySwap": _host_config(MemorySwap=-1),
    "PidsLimit": _host_config(PidsLimit=0),
    "OomScoreAdj": _host_config(OomScoreAdj=0),
    "ShmSize": _host_config(ShmSize=1 << 40),
    "Devices": _host_config(Devices=[DEVICE]),
    "DeviceCgroupRules": _host_config(DeviceCgroupRules=["a *:* rwm"]),
    "GroupAdd": _host_config(GroupAdd=["0"]),
    "ExtraHosts": _host_config(ExtraHosts=["other:127.0.0.1"]),
    "MaskedPaths": _host_config(MaskedPaths=[]),
    "AutoRemove": _host_config(AutoRemove=False),
    "User": lambda body: body.update(User="0:0"),
    "Entrypoint": _other_entrypoint,
    "Mounts, writable": _writable,
    "Mounts, one more": _one_more_mount,
    "Mounts, a bind": _host_config(Binds=["/tmp:/mnt:ro"]),
    "Mounts, a volume": lambda body: body.update(Volumes={"/mnt": {}}),
}


@pytest.mark.engines("docker")
@pytest.mark.parametrize("what", OTHERWISE)
async def test_a_container_that_docker_makes_otherwise_is_never_started(
    what: str, workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H15: what was made is compared with what was asked for; nothing is left of it."""
    real = DockerContainers.create
    start = mock.AsyncMock()

    async def create(self: DockerContainers, config: dict[str, Any], **more: Any) -> DockerContainer:
        changed = copy.deepcopy(config)
        OTHERWISE[what](changed)
        assert changed != config
        return await real(self, changed, **more)

    monkeypatch.setattr(DockerContainers, "create", create)
    monkeypatch.setattr(DockerContainer, "start", start)
    before = containers(os.getpid())
    with pytest.raises(SandboxUnavailable) as caught:
        await CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()).run()
    assert caught.value.layer == "hardened container"
    assert f"the engine made {re.match('[A-Za-z]+', what)[0]} " in caught.value.detail  # pyright: ignore[reportOptionalSubscript]
    start.assert_not_called()
    assert containers(os.getpid()) == before


class DockerMutant(NamedTuple):
    """A container with one of Docker's layers less, the guest's layers that hold too, and what then succeeds."""

    change: Callable[[dict[str, Any]], None]
    guest: tuple[tuple[str, str, str], ...]
    broken: Callable[[CodeExecutor], Any]
    separate: bool = True


NO_FILTERS = (
    ("supervisor.py", r'seccomp\.install\("outer"\)', "pass"),
    ("isolation.py", r'seccomp\.install\("inner"\)', "pass"),
)
AS_SHOWN = ("isolation.py", r"    _restrict_taken\(\)\n", "")
NO_NEW_PRIVILEGES = ("isolation.py", r'    _check\("no new privileges".*\)\n', "")


async def _image_written(executor: CodeExecutor) -> bool:
    return (await inside(executor, created, ["/var/tmp/x"]))["/var/tmp/x"] == "ok"


async def _can_get_capabilities(executor: CodeExecutor) -> bool:
    return int((await inside(executor, status, "self"))["CapBnd"], 16) != 0


async def _set_uid_works(executor: CodeExecutor) -> bool:
    return 0 in (await inside(executor, set_id_programs_run)).values()


async def _loopback_reached(executor: CodeExecutor) -> bool:
    found = await inside(executor, connected, [["127.0.0.1", executor.port]])
    return found[f"tcp 127.0.0.1 {executor.port}"] == "ok"


async def _host_seen(executor: CodeExecutor) -> bool:
    return os.getpid() in await inside(executor, pids)


async def _shared_memory_seen(executor: CodeExecutor) -> bool:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        os.fchmod(file.fileno(), 0o644)
        return (await inside(executor, opened, [file.name]))[file.name] == "ok"


async def _skill_written(executor: CodeExecutor) -> bool:
    executor.workspace.shared_skills_path.chmod(0o777)
    return (await inside(executor, created, ["/app/skills/shared/x"]))["/app/skills/shared/x"] == "ok"


async def _is_root(executor: CodeExecutor) -> bool:
    code = "import os\ntry: os.listdir('/root'); print('listed')\nexcept PermissionError: print('refused')"
    return (await executor.execute(code)).text == "listed"


def forked(count: int) -> int:
    """How many processes can be started, of so many; they live at the same time."""
    reader, writer = os.pipe()
    children: list[int] = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            child = os.fork()
            if child == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            children.append(child)
    os.close(writer)
    for child in children:
        os.waitpid(child, 0)
    return len(children)


async def _processes_unbounded(executor: CodeExecutor) -> bool:
    return await inside(executor, forked, 400) == 400


DOCKER_MUTANTS = {
    "read-only root (A2)": DockerMutant(
        _host_config(ReadonlyRootfs=False), (WITHOUT_LANDLOCK, AS_SHOWN), _image_written, separate=False
    ),
    "read-only root of a lone session (A2)": DockerMutant(
        _host_config(ReadonlyRootfs=False), (WITHOUT_LANDLOCK,), _image_written
    ),
    "read-only folders (A5)": DockerMutant(_writable, (WITHOUT_LANDLOCK,), _skill_written),
    "no network (C3)": DockerMutant(_host_config(NetworkMode="host"), (), _loopback_reached),
    "own processes (D1)": DockerMutant(_host_config(PidMode="host"), (), _host_seen),
    "own shared memory (D6)": DockerMutant(_host_config(IpcMode="host"), (), _shared_memory_seen),
    "bound on processes": DockerMutant(_host_config(PidsLimit=0), (), _processes_unbounded),
    "dropped capabilities (H1)": DockerMutant(
        _host_config(CapDrop=[]), (("isolation.py", r"    drop_capabilities\(\)\n", ""),), _can_get_capabilities
    ),
    "no new privileges (H2)": DockerMutant(
        _secured("no-new-privileges", []), (*NO_FILTERS, NO_NEW_PRIVILEGES, WITHOUT_LANDLOCK), _set_uid_works
    ),
    "system call profile (H3)": DockerMutant(_secured("seccomp=", ["seccomp=unconfined"]), NO_FILTERS, _namespace_made),
    "unprivileged user (H9)": DockerMutant(OTHERWISE["User"], (), _is_root),
}


@pytest.mark.engines("docker")
@pytest.mark.parametrize("missing", [True, False], ids=["without", "with"])
@pytest.mark.parametrize("layer", DOCKER_MUTANTS)
async def test_without_dockers_layer_the_attempt_succeeds(
    layer: str,
    change_guest: Callable[[str, str, str], None],
    workspace_path: Path,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    missing: bool,
) -> None:
    """H15: and with it alone, where the guest's own layers are missing, it is refused."""
    mutant = DOCKER_MUTANTS[layer]
    for change in mutant.guest:
        change_guest(*change)
    real = plan.make_plan

    def make_plan(*args: Any, **kwargs: Any) -> plan.Plan:
        made = real(*args, **kwargs)
        body = copy.deepcopy(dict(made.body))
        mutant.change(body)
        return plan.Plan(body, made.folders)

    if missing:
        monkeypatch.setattr(plan, "make_plan", make_plan)
        monkeypatch.setattr(docker_engine, "audit", mock.Mock())
    async with (
        CodeExecutionContainer(
            workspace_path=workspace_path, engine=engine, preload=(), separate=mutant.separate
        ) as container,
        CodeExecutor("one", container.workspace, container.port) as executor,
    ):
        assert await mutant.broken(executor) is missing
