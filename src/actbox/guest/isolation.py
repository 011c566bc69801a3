"""A session's own namespaces and root, built with Linux system calls.

Order matters: namespaces first (that is where the right to mount comes from), then a fresh root on a tmpfs that holds
this session's folders and nothing else, then `pivot_root` away from everything older, and last every right is given
up: capabilities, new privileges, system calls. Nothing of the guest's own runs before the last step.

Every step that fails raises `LayerError`, which names the layer; nothing is skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import socket
import stat
import struct
from typing import Any

from . import landlock, seccomp

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_ALL_NAMESPACES = (
    CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
)

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_SET_CHILD_SUBREAPER = 36
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_VERSION_3 = 0x20080522
_LAST_CAP_EVER = 63

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_RESOLVER = b"nameserver 127.0.0.1\n"

_RLIMIT_MSGQUEUE = 12

UID = 1000
NEW_ROOT = "/newroot"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# What the session makes anew rather than takes over from the supervisor's root, or does without: an image's /sys tells
# of the machine, and its /run holds what the container's engine has put there.
_OWN = {"proc", "dev", "tmp", "app", "newroot", "sys", "run", "lost+found", ".dockerenv"}

_libc = ctypes.CDLL(None, use_errno=True)


class LayerError(Exception):
    """A layer of the boundary could not be built: `layer` names it, `errno` is the system's reason."""

    def __init__(self, layer: str, errno: int | None, detail: str) -> None:
        self.layer = layer
        self.errno = errno
        self.detail = detail
        super().__init__(f"{layer}: {detail}")


def enter_namespaces() -> None:
    """Move this process into new namespaces of every kind; its next child is pid 1 of the new pid namespace.

    Raises:
        LayerError: user namespaces may not be nested here (a limit, AppArmor, seccomp), or their maps not written.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check("nested namespaces", _libc.unshare(_ALL_NAMESPACES))
    for name, line in (("setgroups", "deny"), ("uid_map", f"{UID} {uid} 1"), ("gid_map", f"{UID} {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        except OSError as exc:  # noqa: PERF203 - three times
            raise LayerError("nested user namespace", exc.errno, f"{name}: {exc.strerror}") from exc


def build_root(binds: list[dict[str, Any]], key: str | None, limits: dict[str, Any]) -> None:
    """Replace the root by a fresh one. Call it as pid 1 of the namespaces that `enter_namespaces` made.

    Args:
        binds: the container's folders, each `{"target", "readonly", "per_key"}`.
        key: the session's key, or None: then it sees no per-key folder.
        limits: `tmp` and `shm` in bytes.

    Raises:
        LayerError: a mount was refused, or a folder is not what it should be.
    """
    _mount("private mounts", None, "/", None, MS_REC | MS_PRIVATE, None)
    _mount("root", "tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m,nr_inodes=4096")
    for name in sorted(os.listdir("/")):
        if name not in _OWN:
            _take_over(f"/{name}", f"{NEW_ROOT}/{name}")
    _restrict_taken()
    _hide_resolver()
    _make_app(binds, key, limits)
    tmp = f"{NEW_ROOT}/tmp"
    os.mkdir(tmp)
    _mount("/tmp", "tmpfs", tmp, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={limits['tmp']}")
    _make_dev(limits)
    os.mkdir(f"{NEW_ROOT}/proc")
    _mount("fresh /proc", "proc", f"{NEW_ROOT}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    for name in ("keys", "key-users"):
        # No namespace divides them: they tell of keyrings of whoever this user is outside.
        if os.path.exists(f"{NEW_ROOT}/proc/{name}"):
            _mount(f"/proc/{name}", f"{NEW_ROOT}/dev/null", f"{NEW_ROOT}/proc/{name}", None, MS_BIND, None)
    os.mkdir(f"{NEW_ROOT}/.old", 0o700)
    pivot_root = _PIVOT_ROOT[os.uname().machine]
    new, old = NEW_ROOT.encode(), f"{NEW_ROOT}/.old".encode()
    _check("pivot_root", _libc.syscall(ctypes.c_long(pivot_root), new, old))
    os.chdir("/")
    _check("old root", _libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    _readonly("/")


def _take_over(source: str, target: str) -> None:
    """Show one entry of the supervisor's root: links are copied, folders bound with all that is mounted in them.

    The supervisor's mounts are read-only, and what a parent user namespace made read-only stays locked so. What is
    neither folder, file nor link, an image has no use for.
    """
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
        return
    if stat.S_ISDIR(mode):
        os.mkdir(target)
    elif stat.S_ISREG(mode):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))
    else:
        return
    _mount(f"bind {source}", source, target, None, MS_BIND | MS_REC, None)


def _restrict_taken() -> None:
    """Make all that was taken over read-only, without set-user programs and devices, where it is not so already.

    It is with bubblewrap. An image is shown by its engine as it is.
    """
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    for fields in lines:
        # The kernel spells blanks, tabs, line ends and backslashes as octal numbers.
        place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        if place.startswith(f"{NEW_ROOT}/") and not {"ro", "nosuid", "nodev"} <= {*fields[5].split(",")}:
            _readonly(place)


def _hide_resolver() -> None:
    """Show no name servers and search domains: an engine may have put the machine's own into /etc."""
    place = f"{NEW_ROOT}/etc/resolv.conf"
    try:
        if not stat.S_ISREG(os.lstat(place).st_mode):
            return
    except OSError:
        return
    with contextlib.suppress(OSError), open(place, "rb") as file:
        if file.read(len(_RESOLVER) + 1) == _RESOLVER:
            # The host's engine has seen to it, and that file may be gone: nothing can be mounted there any more.
            return
    ours = f"{NEW_ROOT}/.resolv.conf"
    with open(ours, "wb") as file:
        file.write(_RESOLVER)
    _mount("/etc/resolv.conf", ours, place, None, MS_BIND, None)
    _readonly(place)
    os.unlink(ours)


def _make_app(binds: list[dict[str, Any]], key: str | None, limits: dict[str, int]) -> None:
    app = f"{NEW_ROOT}/app"
    os.mkdir(app)
    if key is None:
        # A session without a key has no folder of its own: /app itself is its scratch space.
        _mount("/app", "tmpfs", app, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0755,size={limits['tmp']}")
    for bind in binds:
        if bind["per_key"] and key is None:
            continue
        target = f"{NEW_ROOT}{bind['target']}"
        if bind["per_key"]:
            target = f"{target}/{key}"
        os.makedirs(target)
        fd = _open_folder(bind["target"], key if bind["per_key"] else None)
        try:
            _mount(f"bind {bind['target']}", f"/proc/self/fd/{fd}", target, None, MS_BIND, None)
        finally:
            os.close(fd)
        _readonly(target, keep_writable=not bind["readonly"])


def _open_folder(target: str, key: str | None) -> int:
    """A folder below a bind, opened so that a symbolic link left there by an earlier session is never followed."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(target, flags)
        if key is None:
            return fd
        try:
            return os.open(key, flags, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as exc:
        place = target if key is None else f"{target}/{key}"
        raise LayerError("folders", exc.errno, f"{place} is no plain folder: {exc.strerror}") from exc


def _make_dev(limits: dict[str, int]) -> None:
    dev = f"{NEW_ROOT}/dev"
    os.mkdir(dev)
    _mount("/dev", "tmpfs", dev, "tmpfs", MS_NOSUID, "mode=0755,size=64k,nr_inodes=64")
    for name in _DEVICES:
        os.close(os.open(f"{dev}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        _mount(f"/dev/{name}", f"/dev/{name}", f"{dev}/{name}", None, MS_BIND, None)
    for name in ("pts", "shm"):
        os.mkdir(f"{dev}/{name}")
    options = "newinstance,ptmxmode=0666,mode=0620"
    _mount("/dev/pts", "devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)
    shm = f"mode=1777,size={limits['shm']}"
    _mount("/dev/shm", "tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, shm)
    for name, place in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")):
        os.symlink(place, f"{dev}/{name}")
    os.symlink("/proc/self/fd/1", f"{dev}/stdout")
    os.symlink("/proc/self/fd/2", f"{dev}/stderr")
    _readonly(dev)


def raise_loopback() -> None:
    """Bring up `lo` of the session's own network namespace, the only interface there is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def set_limits(limits: dict[str, Any]) -> None:
    """Bound this process and all it will start; see `Limits` on the host's side for the meaning of each."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        # The session is what to kill when the machine runs out of memory. Raising it needs no right.
        file.write("500")
    mapped = _mapped_bytes()
    bounds = [
        # Not 0: where the host hands core dumps to a program, that limit is not looked at; 1 keeps it from starting.
        (resource.RLIMIT_CORE, 1),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_FSIZE, limits["file_size"]),
        (resource.RLIMIT_DATA, limits["memory"]),
        # What is mapped at the start (libraries shared with the other sessions) is not the session's own doing.
        (resource.RLIMIT_AS, mapped + 4 * limits["memory"]),
        (resource.RLIMIT_MEMLOCK, 0),
    ]
    if not _in_machines_user_namespace():
        bounds.append((resource.RLIMIT_NPROC, limits["pids"]))
    for what, value in bounds:
        hard = resource.getrlimit(what)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (bound, bound))
    # gVisor does not let it be set: its queues take memory of its own kernel, which the container's limit bounds.
    with contextlib.suppress(ValueError):
        resource.setrlimit(_RLIMIT_MSGQUEUE, (0, 0))


def _in_machines_user_namespace() -> bool:
    """Whether this user's processes are counted together with all that the user runs on the machine.

    So it is in a container of a single session whose engine makes no user namespaces: there the container's own bound
    on processes is the session's.
    """
    with open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def _mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def drop_capabilities() -> None:
    """Give up every capability in every set, for good.

    Raises:
        LayerError: the kernel kept one.
    """
    for capability in range(_LAST_CAP_EVER + 1):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("Ii", _CAP_VERSION_3, 0)
    _check("capability drop", _libc.capset(header, bytes(24)))
    with open("/proc/self/status") as file:
        kept = [line for line in file if line.startswith("Cap") and int(line.split()[1], 16)]
    if kept:
        raise LayerError("capability drop", None, f"kept {kept[0].strip()}")


def give_up_rights() -> None:
    """The last step: no capabilities, no new privileges, the inner system call filter."""
    drop_capabilities()
    _check("no new privileges", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    try:
        seccomp.install("inner")
    except OSError as exc:
        raise LayerError("seccomp", exc.errno, str(exc)) from exc


def make_domain(binds: list[dict[str, Any]], key: str | None) -> landlock.Domain:
    """The rules that the session's own code is to live under: its writable places are those that the mounts give it.

    Raises:
        LayerError: the system has Landlock, and refused.
    """
    places = ["/tmp", "/dev/shm"]
    if key is None:
        places.append("/app")
    places += (
        f"{bind['target']}/{key}" if bind["per_key"] else bind["target"]
        for bind in binds
        if not bind["readonly"] and (key is not None or not bind["per_key"])
    )
    try:
        return landlock.make(places)
    except OSError as exc:
        raise LayerError("landlock", exc.errno, str(exc)) from exc


def adopt_orphans() -> bool:
    """Let processes below this one that lose their parent become children of this one; False where that cannot be."""
    return _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def set_dumpable(*, value: bool) -> None:
    """Whether processes of the same user may look into this one."""
    _check("dumpable", _libc.prctl(PR_SET_DUMPABLE, int(value), 0, 0, 0))


def _readonly(target: str, *, keep_writable: bool = False) -> None:
    """Remount a mount read-only (or only `nosuid,nodev`), keeping the flags that a parent namespace locked."""
    with_flags = os.statvfs(target).f_flag
    flags = MS_REMOUNT | MS_BIND | MS_NOSUID
    if not keep_writable:
        flags |= MS_RDONLY
    for kernel_flag, mount_flag in (
        (os.ST_RDONLY, MS_RDONLY),
        (os.ST_NODEV, MS_NODEV),
        (os.ST_NOEXEC, MS_NOEXEC),
        (os.ST_NOATIME, 1024),
        (os.ST_NODIRATIME, 2048),
        (os.ST_RELATIME, 1 << 21),
    ):
        if with_flags & kernel_flag:
            flags |= mount_flag
    if target != f"{NEW_ROOT}/dev":
        flags |= MS_NODEV
    _mount(f"remount {target}", None, target, None, flags, None)


def _mount(layer: str, source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    result = _libc.mount(
        source and source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options and options.encode(),
    )
    _check(layer, result)


def _check(layer: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise LayerError(layer, number, os.strerror(number))
