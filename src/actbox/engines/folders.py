"""Holding on to the folders that a container is to show, so that no name can come to mean another one meanwhile."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

from actbox.errors import SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

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
            name = f".actbox-{secrets.token_hex(16)}"
            with contextlib.suppress(OSError):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644, dir_fd=fd))
                opened.callback(_unlink, name, fd)
                marks.append(f"{place}/{name}")
        yield tuple(marks)


def _unlink(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)
