"""A session's private folder as a whole: a copy of it for a branch, and an empty one for files that come back.

Everything is done with the rights of the session and within its own root. Links are copied as links, and what is
neither file, folder nor link is left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import sys
from typing import TYPE_CHECKING, Any

from .places import Refused

if TYPE_CHECKING:
    from .reload import SkillReloader

REQUESTS = frozenset(("settle", "clear"))
BRANCHES = ".branches"
# ioctl_ficlone(2): the same blocks of the disk for both, until one of the two is written to.
_FICLONE = 0x40049409
_MAX_NAME = 64


class PrivateFolder:
    """The folder that a session works in.

    State: `root`, where it is: a branch may have moved to a copy of its own. `first` is where it was in the beginning.
    """

    def __init__(self, root: str, reloader: SkillReloader) -> None:
        self.first = self.root = root
        self._reloader = reloader

    def serve(self, request: dict[str, Any]) -> None:
        """Carry out a request.

        Raises:
            Refused: it cannot be done, for the reason given.
        """
        try:
            if request["type"] == "settle":
                self._settle(str(request["name"]))
            else:
                self._clear()
        except (OSError, shutil.Error) as exc:
            raise Refused(f"{exc}"[:500]) from exc

    def _settle(self, name: str) -> None:
        """Copy the folder, and go on in the copy."""
        if not name.isalnum() or len(name) > _MAX_NAME:
            raise Refused("that is no name for a branch")
        old, new = self.root, f"{self.first}/{BRANCHES}/{name}"
        os.makedirs(os.path.dirname(new), exist_ok=True)
        shutil.copytree(old, new, symlinks=True, ignore=_leave_out(old), copy_function=_copy)
        here = os.getcwd()
        if here == old or here.startswith(f"{old}/"):
            os.chdir(new + here[len(old) :])
            os.environ["PWD"] = os.getcwd()
        sys.path[:] = [new if entry == old else entry for entry in sys.path]
        self._reloader.move(old, new)
        self.root = new

    def _clear(self) -> None:
        with os.scandir(self.root) as entries:
            found = [entry for entry in entries if entry.name != BRANCHES]
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _leave_out(root: str) -> Any:
    def ignored(folder: str, names: list[str]) -> list[str]:
        left = [name for name in names if not _is_copied(os.path.join(folder, name))]
        return [*left, BRANCHES] if folder == root else left

    return ignored


def _is_copied(path: str) -> bool:
    mode = os.lstat(path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def _copy(source: str, target: str) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with open(os.open(source, flags), "rb") as file, open(target, "xb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, file.fileno())
        except OSError:
            shutil.copyfileobj(file, copy, 1 << 20)
        told = os.fstat(file.fileno())
        with contextlib.suppress(OSError):
            os.chmod(copy.fileno(), stat.S_IMODE(told.st_mode) & 0o777)
            os.utime(copy.fileno(), ns=(told.st_atime_ns, told.st_mtime_ns))
