"""What a session uses, as its watcher sees it: memory and processor time of every process in its namespace.

The watcher looks often while the session works, and seldom while it sleeps: memory is only taken by who runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass

_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_SHORTEST, _LONGEST = 0.25, 2.0


@dataclass
class Overrun:
    """A bound that was passed: which one, and what was in use."""

    name: str
    use: float


class Meter:
    """The bounds that only the session as a whole can pass.

    State: `_pause` until the next look, in seconds; the processor time at the last look and at the beginning of the
    cell; whether this cell's overrun was told.
    """

    def __init__(self, limits: dict[str, float | None], own: int) -> None:
        self._memory = int(limits["memory"] or 0)
        self._cpu = limits["cpu"]
        # Where sessions have no pid namespace of their own, what is older than the watcher is none of the session's.
        self._own = own
        self._pause = _SHORTEST
        self._last = 0.0
        self._base = 0.0
        self._told = True

    @property
    def pause(self) -> int:
        """Milliseconds until the next look."""
        return int(1000 * self._pause)

    def begin_cell(self) -> None:
        """The host has sent a cell: processor time counts from here."""
        self._base = self._seconds(_processes(self._own))
        self._told = self._cpu is None
        self._pause = _SHORTEST

    def look(self) -> Overrun | None:
        """What was passed since the last look, if anything."""
        pids = _processes(self._own)
        seconds = self._seconds(pids)
        # A clock tick of the watcher's own looking is no sign of life.
        busy = seconds - self._last > 1.5 / _TICKS
        self._pause = _SHORTEST if busy else min(2 * self._pause, _LONGEST)
        self._last = seconds
        memory = _resident(pids)
        if memory > self._memory:
            # Pages that several processes share were counted for each of them; this takes longer.
            memory = sum(map(_proportional, pids))
            if memory > self._memory:
                return Overrun("memory", memory)
        if not self._told and self._cpu is not None and seconds - self._base > self._cpu:
            self._told = True
            return Overrun("cpu", round(seconds - self._base, 3))
        return None

    def _seconds(self, pids: list[int]) -> float:
        """Processor time of all that live, of their children that ended, and of orphans."""
        gone = resource.getrusage(resource.RUSAGE_CHILDREN)
        return gone.ru_utime + gone.ru_stime + sum(map(_ticks, pids)) / _TICKS


def _processes(own: int) -> list[int]:
    return [pid for name in os.listdir("/proc") if name.isdecimal() and (pid := int(name)) > own]


def _read(path: str) -> bytes:
    # Whoever has ended meanwhile uses nothing.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)
    return b""


def _ticks(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    # utime, stime, and those of children that it has waited for: proc(5), fields 14 to 17.
    return sum(map(int, fields[11:15]))


def _resident(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        fields = _read(f"/proc/{pid}/statm").split()
        total += int(fields[1]) if len(fields) > 1 else 0
    return total * _PAGE


def _proportional(pid: int) -> int:
    """PSS: shared pages count in parts. Who hides from being looked into counts in full."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    return _resident([pid])
