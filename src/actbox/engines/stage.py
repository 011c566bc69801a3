"""Started as real root: shows bubblewrap its sources in a private mount namespace, then becomes an ordinary user.

A sandbox whose processes are uid 0 outside could write root-owned set-uid files into a bound folder, and bubblewrap
run as root covers parts of /proc, so that no fresh one can be mounted beneath. This script is run as
`python -I -S stage.py FD`; the descriptor holds a JSON object:

``mounts``
    `[source, target, owner]` each: bind `source` at `target` below `STAGE`. With `owner` `[uid, gid]` the mount is
    id-mapped, so that what the sandbox's user writes belongs to that owner on the disk.
``uid``, ``gid``
    whom to become; null to stay (then there are no mounts either).
``argv``
    what to execute.
``stage``
    for an engine whose daemon must see the mounts: a folder of root's to mount them below instead, in the namespace
    that this process has. Then it ends: it becomes nobody and executes nothing. Who asked unmounts them (`detach`).

It imports nothing of actbox. Without `stage` it leaves nothing behind: the mounts end with the namespace. If a step
fails it prints one line, `actbox-stage: LAYER: DETAIL`, and exits with 96.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import struct
import sys

STAGE = "/sys"
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_BIND_REC = 4096 | 16384
_MS_REC_PRIVATE = 16384 | (1 << 18)
# The new mount API has the same numbers on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE = 1
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH, _AT_RECURSIVE = 0x100, 0x1000, 0x8000
_AT_FDCWD = -100
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000

_libc = ctypes.CDLL(None, use_errno=True)


class _StageError(Exception):
    def __init__(self, layer: str, detail: str) -> None:
        super().__init__(f"{layer}: {detail}")


def _check(layer: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise _StageError(layer, os.strerror(number))
    return result


def _private_namespace() -> None:
    _check("private mount namespace", _libc.unshare(_CLONE_NEWNS))
    _check("private mount namespace", _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None))
    # Nothing that a sandbox needs is below /sys, and it is there on every machine: no folder has to be made.
    options = b"mode=0755,size=1m"
    _check("staging area", _libc.mount(b"tmpfs", STAGE.encode(), b"tmpfs", ctypes.c_ulong(6), options))


def _bind(stage: str, source: str, target: str, owner: list[int] | None, user: tuple[int, int]) -> None:
    place = f"{stage}/{target}"
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    if owner is None or tuple(owner) == user:
        result = _libc.mount(source.encode(), place.encode(), None, ctypes.c_ulong(_MS_BIND_REC), None)
        _check(f"bind {source}", result)
        return
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW)
    tree = _check(f"open {source}", _libc.syscall(ctypes.c_long(_OPEN_TREE), _AT_FDCWD, source.encode(), flags))
    namespace = _user_namespace(owner, user)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), tree, b"", ctypes.c_uint(_AT_EMPTY_PATH), attributes, ctypes.c_size_t(32)
    )
    if result < 0:
        detail = (
            f"{os.strerror(ctypes.get_errno())} on the file system of {source}; give the folder to uid {user[0]} "
            f"(chown -R {user[0]}:{user[1]} {source}), or run as an ordinary user"
        )
        raise _StageError("id-mapped mounts", detail)
    os.close(namespace)
    moved = _libc.syscall(
        ctypes.c_long(_MOVE_MOUNT), tree, b"", _AT_FDCWD, place.encode(), ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    )
    _check(f"bind {source}", moved)
    os.close(tree)


def _user_namespace(owner: list[int], user: tuple[int, int]) -> int:
    """A user namespace that maps `owner` on the disk to `user` in the mount; only its descriptor is kept."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        result = _libc.unshare(_CLONE_NEWUSER)
        os.write(ready[1], b"y" if result == 0 else b"n")
        os.read(go[0], 1)
        os._exit(0)
    try:
        if os.read(ready[0], 1) != b"y":
            raise _StageError("id-mapped mounts", "user namespaces are off")
        for kind, inner, outer in (("uid", owner[0], user[0]), ("gid", owner[1], user[1])):
            with open(f"/proc/{child}/{kind}_map", "w") as file:
                file.write(f"{inner} {outer} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise _StageError("id-mapped mounts", f"root may not map users ({exc.strerror})") from exc
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (*ready, *go):
            os.close(fd)


def detach(place: str) -> None:
    """Unmount what is mounted there, if anything is; what uses it goes on."""
    _libc.umount2(place.encode(), ctypes.c_int(_MNT_DETACH | _UMOUNT_NOFOLLOW))


def _become(uid: int, gid: int) -> None:
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as exc:
        raise _StageError("unprivileged user", f"root may not become uid {uid} ({exc.strerror})") from exc


def main() -> None:
    """See the module's text."""
    # A host that ignores SIGCHLD would hand that on, and bubblewrap could not wait for its child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(int(sys.argv[1]), "rb") as file:
        work = json.load(file)
    try:
        if work["uid"] is not None:
            own = work.get("stage") is None
            if own:
                _private_namespace()
            for source, target, owner in work["mounts"]:
                _bind(STAGE if own else work["stage"], source, target, owner, (work["uid"], work["gid"]))
            if not own:
                return
            _become(work["uid"], work["gid"])
        os.execve(work["argv"][0], work["argv"], {})
    except _StageError as exc:
        print(f"actbox-stage: {exc}", file=sys.stderr, flush=True)
        sys.exit(96)
    except OSError as exc:
        print(f"actbox-stage: staging: {exc}", file=sys.stderr, flush=True)
        sys.exit(96)


if __name__ == "__main__":
    main()
