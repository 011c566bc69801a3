"""What a session's private folder holds on the host's disk.

The guest may write the folder while it is looked at: it is walked by descriptors, never through a link, and no further
than the limits go.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from actbox.errors import WorkspaceError
from actbox.events import Overrun
from actbox.files import open_folder

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from actbox.spec import Limits

# Seconds between two looks while the disk changes, and while it does not. There is no end to it: what a cell has left
# behind may sleep for an hour, and `fallocate` takes gigabytes in no time at all.
_SHORTEST, _LONGEST = 0.5, 2.0
# A walk may take one part in so many of the time: if it may find something out, and if it well may find an overrun.
_SHARE, _URGENT_SHARE = 20, 2
# What the disk as a whole loses, in parts of a limit, is worth a walk. Others may free room meanwhile, which hides what
# the folder takes: so there is a walk from time to time, in seconds, as long as the disk changes at all.
_WORTH, _SELDOM = 16, 5.0
# Growth below this part of a limit is none: a file system may take more room for a file when it writes it out.
_TRIFLE = 256
# PATH_MAX names no folder that lies deeper.
_MOST_DEPTH = 2048
# Levels of a tree whose descriptors are kept.
_KEPT = 32
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DiskWatch:
    """Tells when a folder has grown beyond `limits.disk` or `limits.files`.

    State: what the folder held when it was first and last walked, None before; how much of that is settled, as it was
    told of or is not this session's doing; the disk's free bytes and files at the
    first walk, at the last one and at the last look; when the last walk ended and how long it took; whether the next
    look is `excused`; the pause until then, in seconds.
    """

    def __init__(self, folder: Path, key: str, limits: Limits) -> None:
        self._folder = folder
        self._key = key
        self._limits = limits
        self._held: tuple[int, int] | None = None
        self._held_at_first: tuple[int, int] = (0, 0)
        self._settled: tuple[int, int] = (0, 0)
        self._free_at_first: tuple[int, int] = (0, 0)
        self._free_at_walk: tuple[int, int] = (0, 0)
        self._free: tuple[int, int] = (0, 0)
        self._walked = 0.0
        self._walk_seconds = 0.0
        self._excused = False
        self.pause = _SHORTEST

    def excuse(self) -> None:
        """What the folder holds at the next look is held against nobody: a cell was ended for it already."""
        self._excused = True

    async def look(self) -> Overrun | None:
        """The limit that the folder has passed since the last look, if any; a folder that is gone holds nothing."""
        try:
            return await asyncio.to_thread(self._look)
        except (OSError, WorkspaceError):
            return None

    def _look(self) -> Overrun | None:
        with open_folder(self._folder, self._key) as folder:
            room = os.statvfs(folder)
            free = room.f_bavail * room.f_frsize, room.f_favail
            self.pause = min(2 * self.pause, _LONGEST) if free == self._free else _SHORTEST
            self._free = free
            before = self._held
            excused, self._excused = self._excused, False
            if (
                before is not None
                and not excused
                and not self._is_worth_a_walk(before, free, counts_files=room.f_files > 0)
            ):
                return None
            self._free_at_walk = free
            self._held = held = self._walk(folder)
        if before is None:
            self._held_at_first, self._free_at_first = held, free
        if before is None or excused:
            self._settled = held
            return None
        return self._judge(held)

    def _is_worth_a_walk(self, held: tuple[int, int], free: tuple[int, int], *, counts_files: bool) -> bool:
        """Whether a walk may find something out, and it is time for one.

        It well may when the whole disk has lost as much as the folder had left.
        """
        passed = time.monotonic() - self._walked
        limits = self._limits.disk, self._limits.files
        lost = [was - now for was, now in zip(self._free_at_walk, free, strict=True)]
        if any(loss > max(limit - had, 0) for loss, limit, had in zip(lost, limits, held, strict=True)):
            return passed >= _URGENT_SHARE * self._walk_seconds
        # Some file systems have no number of files to run out of: there any change may be a flood of empty ones.
        soon = not counts_files or any(loss > limit // _WORTH for loss, limit in zip(lost, limits, strict=True))
        least = max(0.0 if soon else _SELDOM, _SHARE * self._walk_seconds)
        return free != self._free_at_walk and passed >= least

    def _judge(self, held: tuple[int, int]) -> Overrun | None:
        """What is over and has grown; what has not is an earlier session's, and may still be cleaned up."""
        settled = self._settled
        self._settled = min(settled[0], held[0]), min(settled[1], held[1])
        for name, limit, was, now in zip(
            ("disk", "files"), (self._limits.disk, self._limits.files), settled, held, strict=True
        ):
            if now > limit and now - was > limit // _TRIFLE:
                self._settled = held
                return Overrun(name, limit, now)
        return None

    def _walk(self, folder: int) -> tuple[int, int]:
        """Bytes on the disk, and entries; no further than until either limit is passed for certain."""
        began = time.monotonic()
        most = 2 * self._limits.files
        total, count = 0, 0
        linked: set[tuple[int, int]] = set()
        with _Descent(folder) as descent:
            while (here := descent.enter_next()) is not None and total <= 2 * self._limits.disk and count <= most:
                with contextlib.suppress(OSError), os.scandir(here) as entries:
                    for entry in itertools.islice(entries, most):
                        count += 1
                        if entry.is_dir(follow_symlinks=False):
                            descent.enter_later(entry.name)
                        with contextlib.suppress(OSError):
                            told = entry.stat(follow_symlinks=False)
                            if told.st_nlink > 1 and (inode := (told.st_dev, told.st_ino)) not in linked:
                                # A file of many names takes its room once. (So does a folder, which nothing links.)
                                linked.add(inode)
                            elif told.st_nlink > 1:
                                continue
                            total += told.st_blocks * 512
        if descent.too_deep:
            # What cannot be looked at must not count for nothing.
            count = max(count, most + 1)
        if descent.shut and self._held is not None:
            # Nor what is shut to us, such as a folder of mode 0300: then all that the disk has lost is laid to it.
            total = max(total, self._held_at_first[0] + self._free_at_first[0] - self._free_at_walk[0])
            count = max(count, self._held_at_first[1] + self._free_at_first[1] - self._free_at_walk[1])
        self._walked = time.monotonic()
        self._walk_seconds = self._walked - began
        return total, count


@dataclass
class _Level:
    """A folder on the way: its descriptor, unless closed meanwhile, and the folders in it still to be entered."""

    name: str
    fd: int | None
    waiting: list[str] = field(default_factory=list[str])


class _Descent:
    """Goes through a tree of folders, deepest first, one component at a time and never through a link.

    Whatever the shape of the tree, it holds few descriptors, and opens few folders twice: those of the deepest levels
    stay open, and a way back to one that was closed serves as many again.

    State: the levels from the top to the folder entered last; whether some folder was `shut` to us or `too_deep`.
    """

    def __init__(self, folder: int) -> None:
        self._top = folder
        self._levels: list[_Level] = []
        self.shut = False
        self.too_deep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._levels:
            self._leave()

    def enter_later(self, name: str) -> None:
        """Note a folder in the one that was entered last."""
        if len(self._levels) > _MOST_DEPTH:
            self.too_deep = True
        else:
            self._levels[-1].waiting.append(name)

    def enter_next(self) -> int | None:
        """A descriptor of the next folder, the first one the top itself; None if there is none left."""
        if not self._levels:
            self._levels.append(_Level(".", os.open(".", _FLAGS, dir_fd=self._top)))
            return self._levels[-1].fd
        while self._levels:
            level = self._levels[-1]
            if not level.waiting:
                self._leave()
                continue
            name = level.waiting.pop()
            try:
                fd = os.open(name, _FLAGS, dir_fd=self._descriptor())
            except OSError as exc:
                self.shut = self.shut or exc.errno == errno.EACCES
                continue
            self._levels.append(_Level(name, fd))
            if len(self._levels) > _KEPT:
                self._close(self._levels[-_KEPT - 1])
            return fd
        return None

    def _descriptor(self) -> int:
        """The last level's. If it was closed, the way to it is gone again, and the last of the levels on it kept."""
        last = self._levels[-1]
        if last.fd is None:
            here = os.open(".", _FLAGS, dir_fd=self._top)
            first_kept = max(len(self._levels) - _KEPT, 0)
            for number, level in enumerate(self._levels):
                if number > 0:
                    above = here
                    try:
                        here = os.open(level.name, _FLAGS, dir_fd=above)
                    except OSError:
                        last.waiting.clear()
                        raise
                    finally:
                        if number <= first_kept:
                            os.close(above)
                if number >= first_kept:
                    self._close(level)
                    level.fd = here
            return here
        return last.fd

    def _leave(self) -> None:
        self._close(self._levels.pop())

    def _close(self, level: _Level) -> None:
        if level.fd is not None:
            os.close(level.fd)
            level.fd = None
