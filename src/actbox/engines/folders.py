"""Holding on to the folders that a container is to show, so that no name can come to mean another one meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import stat
import time
from typing import TYPE_CHECKING

from actbox.errors import SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_MARK = re.compile(r"\.actbox-[0-9a-f]{32}")
_OLD_SECONDS = 600.0
_MOST_LOOKED_AT = 10_000
_REMEDY = "Keep the container's folders in place while it starts; none may be a symbolic link."


@contextlib.contextmanager
def hold_folders(folders: tuple[tuple[str, Path], ...]) -> Generator[tuple[tuple[str, int, int], ...]]:
    """What the folders, (place, source), are by device and inode; held open so that no number can be used anew.

    Raises:
        SandboxUnavailable: one is missing, no folder, or a symbolic link.
    """
    with contextlib.ExitStack() as opened:
        found: list[tuple[str, int, int]] = []
        for place, source in folders:
            try:
                fd = os.open(source, _FLAGS)
            except OSError as exc:
                raise SandboxUnavailable("folders", str(exc), _REMEDY) from exc
            opened.callback(os.close, fd)
            status = os.fstat(fd)
            found.append((place, status.st_dev, status.st_ino))
        yield tuple(found)


@contextlib.contextmanager
def mark_folders(folders: tuple[tuple[str, Path], ...]) -> Generator[tuple[str, ...]]:
    """Put an empty file with a name that nobody can guess into each folder, (place, source), for as long as the block.

    Where numbers of devices and inodes say nothing, as with another machine's engine, seeing that file is what tells
    that the folder at a place is the one that was meant. A folder in which this user may not write gets none.

    Yields:
        The places where the files must be seen.

    Raises:
        SandboxUnavailable: a folder is missing, no folder, or a symbolic link.
    """
    with contextlib.ExitStack() as opened:
        marks: list[str] = []
        for place, source in folders:
            try:
                fd = os.open(source, _FLAGS)
            except OSError as exc:
                raise SandboxUnavailable("folders", str(exc), _REMEDY) from exc
            opened.callback(os.close, fd)
            _sweep(fd)
            name = f".actbox-{secrets.token_hex(16)}"
            with contextlib.suppress(OSError):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644, dir_fd=fd))
                opened.callback(_unlink, name, fd)
                marks.append(f"{place}/{name}")
        yield tuple(marks)


def _sweep(folder: int) -> None:
    """Remove marks that a killed host left: empty files of that name, older than any start takes."""
    with contextlib.suppress(OSError):
        # A folder may be listed that was opened only to be walked through.
        listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            with os.scandir(listing) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MOST_LOOKED_AT)]
            for name in filter(_MARK.fullmatch, names):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not status.st_size and time.time() - status.st_mtime > _OLD_SECONDS:
                    os.unlink(name, dir_fd=folder)
        finally:
            os.close(listing)


def _unlink(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)
