"""Folders and files opened by descriptor, one component at a time and never through a symbolic link.

This file, `packing` and `unpacking` serve both sides of a transfer: to either the other one's files were written by
somebody else. They need the standard library alone. Names are bytes, as the system has them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

# What a transfer may hold, on its way in either direction.
MAX_DEPTH = 100
MAX_ENTRIES = 100_000
MAX_NAME = 255
# Names, and the characters of all of them, which travel in one header.
MAX_LEFT_OUT = 1000
MAX_LEFT_OUT_TEXT = 64 << 10

# Where a session's files can be; a path that is not absolute is below the first.
ROOTS = ("/app", "/tmp")

# O_PATH, where there is one: to walk through a folder one need not be allowed to list it.
_THROUGH: int = getattr(os, "O_PATH", os.O_RDONLY)
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK to open a named pipe would wait for a writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Refused(Exception):
    """What cannot be transferred: `reason` is for people, with the name made printable, `bare` without it."""

    def __init__(self, reason: str, name: bytes | None = None) -> None:
        self.bare = reason
        self.reason = reason if name is None else f"{legible(name)}: {reason}"
        super().__init__(self.reason)


def legible(name: bytes) -> str:
    """A name as printable text: bytes that are no UTF-8, and characters that drive a terminal, are escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def kind(mode: int) -> str:
    """What a file of this mode is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def split(path: str) -> tuple[str, list[bytes]]:
    """A path inside as its root, one of `ROOTS`, and the components below.

    Raises:
        Refused: it leads elsewhere, or has a component that no file system takes.
    """
    try:
        parts = [part for part in path.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
    except UnicodeEncodeError:
        raise Refused("it has characters that no encoding carries") from None
    root = ROOTS[0]
    if not path or b".." in parts:
        raise Refused(f"pass a path below {' or '.join(ROOTS)} without '..'")
    if path.startswith("/"):
        roots = [known for known in ROOTS if [known[1:].encode()] == parts[:1]]
        if not roots:
            raise Refused(f"pass a path below {' or '.join(ROOTS)}; one that is not absolute is below {ROOTS[0]}")
        root = roots[0]
        del parts[0]
    if any(b"\0" in part or len(part) > MAX_NAME for part in parts) or len(parts) > MAX_DEPTH:
        raise Refused(f"a path has at most {MAX_DEPTH} components of at most {MAX_NAME} bytes, none of them NUL")
    return root, parts


def enter(above: int | None, name: bytes, *, make: bool = False, read: bool = False) -> int:
    """A descriptor of the folder `name` within another, made with `make` when missing; `read` to list it too.

    Raises:
        Refused: it is no folder.
        OSError: it is missing, or out of reach.
    """
    flags = _FOLDER | (os.O_RDONLY if read else _THROUGH)
    try:
        try:
            return os.open(name, flags, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=above)
        return os.open(name, flags, dir_fd=above)
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        found = os.lstat(name, dir_fd=above).st_mode
        raise Refused(f"it is {kind(found)}, not a folder", name) from exc


def open_file(above: int | None, name: bytes) -> tuple[int, os.stat_result]:
    """A descriptor to read the regular file `name` within a folder, and what it was when it was opened. Never waits.

    Raises:
        Refused: it is anything else than a regular file.
        OSError: it is missing, or out of reach.
    """
    # To open a device can set it going: it is looked at before, and, as it may be replaced meanwhile, after.
    found = os.lstat(name, dir_fd=above)
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"it is {kind(found.st_mode)}, not a regular file", name)
    try:
        file = os.open(name, _FILE, dir_fd=above)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            raise Refused("it is no longer a regular file", name) from exc
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise Refused(f"it is {kind(found.st_mode)}, not a regular file", name)
    return file, found


def names(folder: int, limit: int = MAX_ENTRIES) -> list[bytes]:
    """The names in a folder that was opened to be read, sorted.

    Raises:
        Refused: they are more than `limit`.
    """
    found: list[bytes] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(found) == limit:
                raise Refused(f"there are more than {MAX_ENTRIES} entries")
            found.append(os.fsencode(entry.name))
    return sorted(found)


def remove(above: int, name: bytes) -> None:
    """Remove a folder and all in it, as far as that can be done. Never raises."""
    with contextlib.suppress(OSError, Refused, RecursionError):
        folder = enter(above, name, read=True)
        try:
            with os.scandir(folder) as entries:
                found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
            for entry, is_folder in found:
                if is_folder:
                    remove(folder, entry)
                else:
                    os.unlink(entry, dir_fd=folder)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=above)
