"""What a session's private folder holds on the host's disk.

The guest may write the folder while it is looked at: it is walked by descriptors, never through a link, and no further
than the limits go.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING

from actbox.errors import WorkspaceError
from actbox.events import Overrun
from actbox.files import open_folder

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from actbox.spec import Limits

_SHORTEST = 0.5
# A walk may take this part of the time.
_SHARE = 20
# Seconds without any change of the disk after which nobody looks any more, until the next cell.
_QUIET = 10.0
# Below this part of a limit, what the disk as a whole has lost cannot have brought the folder over it.
_WORTH = 16
_MOST_DEPTH = 500
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DiskWatch:
    """Tells when a folder has grown beyond `limits.disk` or `limits.files`.

    State: what the folder held when it was last walked, None before; the disk's free bytes and files then; when they
    last changed; the pause until the next look, in seconds.
    """

    def __init__(self, folder: Path, key: str, limits: Limits) -> None:
        self._folder = folder
        self._key = key
        self._limits = limits
        self._held: tuple[int, int] | None = None
        self._free: tuple[int, int] = (0, 0)
        self._seen: tuple[int, int] = (0, 0)
        self._changed = time.monotonic()
        self.pause = _SHORTEST

    @property
    def quiet(self) -> bool:
        """Whether the disk has not changed for a while."""
        return time.monotonic() - self._changed > _QUIET

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
            if free != self._seen:
                self._seen, self._changed = free, time.monotonic()
            if self._held is not None and not self._may_be_over(free):
                return None
            before, self._held, self._free = self._held, self._walk(folder), free
        return self._judge(before)

    def _may_be_over(self, free: tuple[int, int]) -> bool:
        """Whether the whole disk has lost as much as the folder had left, or a fair part of a limit."""
        assert self._held is not None  # noqa: S101 - asked only after a walk
        for held, limit, was, now in zip(
            self._held, (self._limits.disk, self._limits.files), self._free, free, strict=True
        ):
            if was - now > min(max(limit - held, 0), limit // _WORTH):
                return True
        return False

    def _judge(self, before: tuple[int, int] | None) -> Overrun | None:
        """What is over, unless it was at the first look and has not grown: then it is an earlier session's."""
        assert self._held is not None  # noqa: S101 - just walked
        for place, name in enumerate(("disk", "files")):
            held, limit = self._held[place], getattr(self._limits, name)
            if held > limit and before is not None and held > before[place]:
                return Overrun(name, limit, held)
        return None

    def _walk(self, folder: int) -> tuple[int, int]:
        """Bytes on the disk, and entries; no further than until either limit is passed for certain."""
        began = time.monotonic()
        most = 2 * self._limits.files
        total, count = 0, 0
        waiting: list[tuple[str, ...]] = [()]
        while waiting and total <= 2 * self._limits.disk and count <= most:
            parts = waiting.pop()
            # One descriptor at a time, whatever the shape of the tree.
            with contextlib.suppress(OSError), _opened(folder, parts) as here, os.scandir(here) as entries:
                for entry in itertools.islice(entries, most):
                    count += 1
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((*parts, entry.name))
            if len(parts) > _MOST_DEPTH:
                # Nobody needs that, and what hides there must not count for nothing.
                count = most + 1
        self.pause = max(_SHORTEST, _SHARE * (time.monotonic() - began))
        return total, count


@contextlib.contextmanager
def _opened(folder: int, parts: tuple[str, ...]) -> Generator[int]:
    """A folder below another, reached one component at a time and never through a link."""
    here = os.open(".", _FLAGS, dir_fd=folder)
    try:
        for part in parts:
            above, here = here, os.open(part, _FLAGS, dir_fd=here)
            os.close(above)
        yield here
    finally:
        os.close(here)
