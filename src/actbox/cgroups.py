"""A control group for each session, where this process may make them: the kernel's own bounds on the session's memory.

Root makes them at the top of the hierarchy; anybody else below a folder that was delegated to them and is named by
`ACTBOX_CGROUP` (cgroup v2, no processes in it, with the controllers memory and pids). Where neither is so, a session is
bounded by the limits of its processes and the watcher inside (`guest/usage.py`), which are in force in any case.

The kernel's documents: admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/{memory,pids}.rst.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actbox.spec import Limits

_TOP = Path("/sys/fs/cgroup")
# Threads of the watcher and of what leads to the proxy count too.
_OWN_PIDS = 8
_OWN_MEMORY = 64 << 20
_numbers = itertools.count(1)
_EMPTY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made: of version 2 one folder, of version 1 one for each controller."""

    version: int
    memory: Path
    pids: Path

    def __str__(self) -> str:
        return f"cgroup v{self.version}"


def find() -> Hierarchy | None:
    """The hierarchy in which this process may make groups; None if there is none."""
    named = os.environ.get("ACTBOX_CGROUP")
    if named:
        return _version_2(Path(named))
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    return _version_2(_TOP) or _version_1()


def _version_2(folder: Path) -> Hierarchy | None:
    with contextlib.suppress(OSError):
        wanted = {"memory", "pids"}
        if not wanted <= set((folder / "cgroup.controllers").read_text().split()):
            return None
        handed_on = folder / "cgroup.subtree_control"
        if not wanted <= set(handed_on.read_text().split()):
            handed_on.write_text("+memory +pids")
        return Hierarchy(2, folder, folder) if os.access(folder, os.W_OK) else None
    return None


def _version_1() -> Hierarchy | None:
    memory, pids = _TOP / "memory", _TOP / "pids"
    if all((folder / "cgroup.procs").is_file() and os.access(folder, os.W_OK) for folder in (memory, pids)):
        return Hierarchy(1, memory, pids)
    return None


class Group:
    """One session's group. Made empty; `add` puts the session's first process in, before anything of the guest runs.

    State: the folders, until `remove`.
    """

    def __init__(self, hierarchy: Hierarchy, limits: Limits) -> None:
        self._version = hierarchy.version
        name = f"actbox-{os.getpid()}-{next(_numbers)}"
        self._memory = hierarchy.memory / name
        self._pids = hierarchy.pids / name
        try:
            for folder in {self._memory, self._pids}:
                folder.mkdir()
            memory, pids = limits.memory + _OWN_MEMORY, limits.pids + _OWN_PIDS
            if self._version == 2:  # noqa: PLR2004 - the two versions there are
                self._set(self._memory, "memory.max", memory)
                self._set(self._memory, "memory.swap.max", 0, optional=True)
                # All of it or nothing: what is left of a session that lost processes is of no use.
                self._set(self._memory, "memory.oom.group", 0, optional=True)
            else:
                self._set(self._memory, "memory.limit_in_bytes", memory)
                self._set(self._memory, "memory.memsw.limit_in_bytes", memory, optional=True)
            self._set(self._pids, "pids.max", pids)
        except BaseException:
            self.remove()
            raise

    def add(self, pid: int) -> None:
        """Put a process in, and with it all that it will start.

        Raises:
            OSError: it has ended, or may not be moved.
        """
        if pid <= 0:
            # To the system 0 means whoever writes: this process itself.
            raise ProcessLookupError(f"{pid} is no process")
        for folder in {self._memory, self._pids}:
            (folder / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int:
        """The most bytes that the group has held; 0 if the kernel does not tell."""
        name = "memory.peak" if self._version == 2 else "memory.max_usage_in_bytes"  # noqa: PLR2004
        with contextlib.suppress(OSError, ValueError):
            return int((self._memory / name).read_text())
        return 0

    def memory_kills(self) -> int:
        """How many processes of the group the kernel has killed because it held too much."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"  # noqa: PLR2004
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", (self._memory / name).read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
        return 0

    def remove(self) -> None:
        """Remove the group, whose processes must have been killed; waits a moment for the last of them to go."""
        deadline = time.monotonic() + _EMPTY_SECONDS
        for folder in {self._memory, self._pids}:
            while folder.is_dir():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)

    def _set(self, folder: Path, name: str, value: int, *, optional: bool = False) -> None:
        try:
            (folder / name).write_text(str(value))
        except OSError:
            # A kernel without swap accounting has no such file.
            if not optional:
                raise


def sweep(hierarchy: Hierarchy) -> None:
    """Remove the groups of processes that have ended; a group with processes in it cannot be removed."""
    for folder in {hierarchy.memory, hierarchy.pids}:
        with contextlib.suppress(OSError):
            for group in folder.glob("actbox-*-*"):
                pid = group.name.split("-")[1]
                if not Path("/proc", pid).exists():
                    with contextlib.suppress(OSError):
                        group.rmdir()
