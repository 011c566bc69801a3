"""What a session uses, as its watcher sees it: memory and processor time of every process in its namespace.

The watcher looks often while the session works, and seldom while it sleeps: memory is only taken by who runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_SHORTEST, _LONGEST = 0.25, 2.0
# Growth below this part of a limit is none: a file system may take more room for a file when it writes it out.
_TRIFLE = 256
# Descriptors that one look asks about, so that their number does not hold up the rest.
_MOST_FDS = 4096
# To weigh a process waits for its memory's lock, which one that forks without end hardly ever lets go: so much of it in
# one look, and the rest in those that follow at once.
_WEIGHING_SECONDS = 0.02
# How often what is to be stopped is looked for before it is killed.
_ROUNDS = 20


@dataclass
class Overrun:
    """A bound that was passed: which one, what was in use, and by which kernel, 0 for the session as a whole."""

    name: str
    use: float
    kernel: int = 0


class Meter:
    """The bounds that only the session as a whole can pass.

    Args:
        limits: `memory` and `disk` in bytes, `cpu` in seconds or None.
        own: the number of the watcher's process.
        place: the folder whose disk `disk` is about.

    A session has one kernel, until that is forked. From then on processor time is each kernel's own: what it and its
    children were seen to use. Who has left its family, and its terminal session too, counts to nobody's cell.

    State: `_pause` until the next look, in seconds; the processor time at the last look, and from where it counts, None
    before the first cell; that of each process, and the sum of what they were seen to use; the bytes in deleted files
    that were told of; `_unweighed`, the processes whose memory is still to be weighed, and `_weighed`, the bytes of the
    others. Of a session of several kernels: `_used`, the ticks of each, and `_bases`, those at the
    beginning of its cell.
    """

    def __init__(self, limits: dict[str, float | None], own: int, place: str) -> None:
        self._memory = int(limits["memory"] or 0)
        self._disk = int(limits["disk"] or 0)
        self._cpu = limits["cpu"]
        # Where sessions have no pid namespace of their own, what is older than the watcher is none of the session's.
        self._own = own
        self._device = os.stat(place).st_dev
        self._pause = _SHORTEST
        self._last = 0.0
        self._base: float | None = None
        self._times: dict[int, int] = {}
        self._seen = 0
        self._told = 0
        self._unweighed: list[int] = []
        self._weighed = 0
        self._several = False
        self._used: dict[int, int] = {}
        self._bases: dict[int, int] = {}

    @property
    def pause(self) -> int:
        """Milliseconds until the next look."""
        return 0 if self._unweighed else int(1000 * self._pause)

    def begin_cell(self, kernels: Sequence[int] = (), kernel: int = 0) -> None:
        """The host has sent a cell to one of the kernels: processor time counts from here."""
        self._base = self._seconds(_processes(self._own), kernels)
        self._bases[kernel] = self._used.get(kernel, 0)
        self._pause = _SHORTEST

    def look(self, kernels: Sequence[int] = ()) -> Overrun | None:
        """What was passed since the last look, if anything."""
        pids = _processes(self._own)
        seconds = self._seconds(pids, kernels)
        # A clock tick of the watcher's own looking is no sign of life.
        busy = seconds - self._last > 1.5 / _TICKS
        self._pause = _SHORTEST if busy else min(2 * self._pause, _LONGEST)
        self._last = seconds
        over = self._look_at_memory(pids) or self._look_at_time(seconds)
        if over is not None:
            return over
        deleted = _in_deleted_files(pids, self._device)
        self._told = min(self._told, deleted)
        if deleted > self._disk and deleted - self._told > self._disk // _TRIFLE:
            self._told = deleted
            return Overrun("disk", deleted)
        return None

    def _look_at_memory(self, pids: list[int]) -> Overrun | None:
        if not self._unweighed and _resident(pids) > self._memory:
            # Pages that several processes share were counted for each of them; this takes longer.
            self._unweighed, self._weighed = pids[::-1], 0
        enough = monotonic() + _WEIGHING_SECONDS
        while self._unweighed and monotonic() < enough:
            self._weighed += _proportional(self._unweighed.pop())
        if self._unweighed or self._weighed <= self._memory:
            return None
        weighed, self._weighed = self._weighed, 0
        return Overrun("memory", weighed)

    def _look_at_time(self, seconds: float) -> Overrun | None:
        # Who goes on after this is told of again.
        if self._cpu is None or self._base is None:
            return None
        if not self._several:
            if seconds - self._base > self._cpu:
                used, self._base = seconds - self._base, seconds
                return Overrun("cpu", round(used, 3))
            return None
        for kernel, base in self._bases.items():
            used = (self._used.get(kernel, 0) - base) / _TICKS
            if used > self._cpu:
                self._bases[kernel] = self._used[kernel]
                return Overrun("cpu", round(used, 3), kernel)
        return None

    def forget(self, kernel: int) -> None:
        """A kernel has ended."""
        self._used.pop(kernel, None)
        self._bases.pop(kernel, None)

    def _seconds(self, pids: list[int], kernels: Sequence[int]) -> float:
        """Processor time of all that live, of their children that ended, and of orphans.

        The system forgets the time of children that nobody waits for (whose parent ignores SIGCHLD): what they were
        seen to use counts then.
        """
        gone = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._several = self._several or len(kernels) > 1
        owners = _owners(pids, kernels) if self._several else {}
        before, self._times = self._times, {}
        total = 0
        for pid in pids:
            own, children = _ticks(pid)
            self._times[pid] = own
            new = own - before.get(pid, 0) if own >= before.get(pid, 0) else own
            self._seen += new
            total += own + children
            owner = owners.get(pid)
            if owner is not None:
                self._used[owner] = self._used.get(owner, 0) + new
        return max(gone.ru_utime + gone.ru_stime + total / _TICKS, self._seen / _TICKS)


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


def _ticks(pid: int) -> tuple[int, int]:
    """A process's own processor time, and that of children that it has waited for."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    # utime, stime, cutime, cstime: proc(5), fields 14 to 17.
    return sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))


def _owners(pids: list[int], kernels: Sequence[int]) -> dict[int, int]:
    """To which kernel each process belongs: by its parents, or, once it has lost them, by its terminal session."""
    parents: dict[int, int] = {}
    terminals: dict[int, int] = {}
    for pid in pids:
        # ppid, pgrp, session: proc(5), fields 4 to 6.
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if len(fields) > 3:  # noqa: PLR2004 - else it has ended
            parents[pid], terminals[pid] = int(fields[1]), int(fields[3])
    owners: dict[int, int] = {}
    for pid in parents:
        above = pid
        for _ in parents:  # numbers may be given anew meanwhile: no chain is longer
            if above in kernels or above not in parents:
                break
            above = parents[above]
        if above not in kernels:
            above = terminals[pid]
        if above in kernels:
            owners[pid] = above
    return owners


def belongings(kernel: int, kernels: Sequence[int], own: int) -> list[int]:
    """The processes of one of a session's kernels, as far as they can be known to be its own; not the kernel."""
    owners = _owners(_processes(own), kernels)
    return [pid for pid, owner in owners.items() if owner == kernel and pid != kernel]


def end_terminal(terminal: int, own: int) -> bool:
    """Kill what lives in a terminal session; whether there was anything.

    All of it is stopped first: who forks without end would otherwise fill each place that a kill makes free.
    """
    found: set[int] = set()
    for _ in range(_ROUNDS):
        running = [pid for pid in _processes(own) if _lives_in(pid, terminal)]
        if not running:
            break
        found.update(running)
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(found)


def _lives_in(pid: int, terminal: int) -> bool:
    # state, ppid, pgrp, session: proc(5), fields 3 to 6.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:4]
    return fields[3:] == [b"%d" % terminal] and fields[0] not in (b"Z", b"X", b"T")


def weight(kernel: int) -> int:
    """Bytes of memory that a kernel's own process takes; pages that it shares with others count in parts."""
    return _proportional(kernel)


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


def _in_deleted_files(pids: list[int], device: int) -> int:
    """Bytes on a disk in files that are open and have no name any more: no walk through a folder finds them."""
    held: dict[int, int] = {}
    fds = (f"/proc/{pid}/fd/{fd}" for pid in pids for fd in _listed(f"/proc/{pid}/fd"))
    for path in itertools.islice(fds, _MOST_FDS):
        with contextlib.suppress(OSError):
            told = os.stat(path)
            if told.st_nlink == 0 and told.st_dev == device:
                held[told.st_ino] = told.st_blocks * 512
    return sum(held.values())


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []
