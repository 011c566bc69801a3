"""Whose a container is: labels that tell whether the process that made it still lives.

A container ends by itself when its host's process does: its control stream ends. What can be left behind is one that
was never started, or whose engine was killed as well. It is removed by the next start on the same machine, or by
`actbox prune`; a container whose owner lives, or cannot be asked from here, is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import stat
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LABEL = "actbox.owner"
TAG_LABEL = "actbox.tag"
USER_LABEL = "actbox.user"
_START_TIME = 21  # field 22 of /proc/PID/stat, counted from the third, which follows the name in parentheses

Life = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Owner:
    """A process.

    `machine` and `boot` say where it runs, `space` in which pid namespace; `started` tells it from a later process of
    the same number.
    """

    machine: str
    boot: str
    space: str
    pid: int
    started: str

    def __str__(self) -> str:
        return "/".join((self.machine, self.boot, self.space, str(self.pid), self.started))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner in a label; None if it is none of ours."""
        parts = text.split("/")
        if len(parts) != 5 or not parts[3].isdecimal():  # noqa: PLR2004 - its fields
            return None
        return cls(parts[0], parts[1], parts[2], int(parts[3]), parts[4])

    def life(self) -> Life:
        """Whether the process lives, as far as can be told from here."""
        here = this_process()
        if self.machine != here.machine:
            return "unknown"
        if self.boot != here.boot:
            return "dead"
        if self.space != here.space:
            return "unknown"
        started = _started(self.pid)
        if started is None:
            return "dead"
        return "alive" if started in (self.started, "") else "dead"


def this_process() -> Owner:
    """The owner that this process is."""
    pid = os.getpid()
    machine, boot, space = _place(pid)
    return Owner(machine, boot, space, pid, _started(pid) or "")


def labels(tag: str) -> dict[str, str]:
    """What marks a container as made by this process."""
    return {LABEL: str(this_process()), TAG_LABEL: tag, USER_LABEL: str(_uid())}


def owner_of(labels: Mapping[str, str]) -> Owner | None:
    """The owner that a container's labels name."""
    return Owner.parse(labels.get(LABEL, ""))


# -- folders for sockets ---------------------------------------------------------------------------------------------


def make_folder() -> Path:
    """A new folder, open to nobody else, with a path short enough for a socket (107 bytes)."""
    own = this_process()
    return Path(tempfile.mkdtemp(prefix=f"actbox-{own.space or 0}-{own.pid}-{own.started}-", dir=_base()))


def remove_folder(folder: Path) -> None:
    """Remove a folder of `make_folder`: its sockets, and the places of mounts, which are detached first.

    Never what lies below a mount: a place that is one still cannot be removed, and is left for the next start.
    """
    for place in _entries(folder):
        if place.is_symlink() or not place.is_dir():
            with contextlib.suppress(OSError):
                place.unlink()
            continue
        if _uid() == 0:
            from actbox.engines.stage import detach  # noqa: PLC0415 - of use to root on Linux alone

            detach(str(place))
        if place.name == "s":
            for inner in _entries(place):
                inner.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def sweep() -> None:
    """Remove folders of `make_folder` whose process has ended."""
    for folder, own in _left_folders():
        if own.life() == "dead":
            remove_folder(folder)


def _left_folders() -> Iterator[tuple[Path, Owner]]:
    here = this_process()
    for folder in Path(_base()).glob(f"actbox-{here.space or 0}-*-*-*"):
        pid, started = folder.name.split("-")[2:4]
        with contextlib.suppress(OSError, ValueError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == _uid():
                yield folder, Owner(here.machine, here.boot, here.space, int(pid), started)


def _base() -> str:
    for folder in ("/run", f"/run/user/{_uid()}"):
        if os.access(folder, os.W_OK | os.X_OK) and os.stat(folder).st_uid == _uid():  # noqa: PTH116
            return folder
    return "/tmp" if sys.platform.startswith("linux") else tempfile.gettempdir()


# -- processes -------------------------------------------------------------------------------------------------------


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    return ""


@functools.lru_cache(maxsize=1)
def _place(_pid: int) -> tuple[str, str, str]:
    """Machine, boot and pid namespace of this process; asked anew after a fork."""
    machine = _read("/etc/machine-id") or f"{socket.gethostname()}-{uuid.getnode():x}"
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115
    return machine.replace("/", "_"), _read("/proc/sys/kernel/random/boot_id") or platform.node(), space


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if there is none, "" if this system does not tell."""
    if sys.platform.startswith("linux"):
        line = _read(f"/proc/{pid}/stat")
        fields = line.rpartition(")")[2].split()
        # A zombie has ended, whatever its parent does.
        return fields[_START_TIME - 2] if len(fields) > _START_TIME and fields[0] not in "ZX" else None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return ""
