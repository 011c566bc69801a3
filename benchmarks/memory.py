"""What processes hold for themselves alone, read from /proc."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Unique:
    """Bytes of private pages of `processes` processes; those of `unread` more could not be read and are missing."""

    size: int
    processes: int
    unread: int


def descendants(ancestor: int) -> set[int]:
    """The pids of all processes that this one started, and that those did."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            try:
                # The name, in parentheses, may hold anything; the state and the parent's pid follow it.
                rest = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            children[int(rest[1])].append(int(folder.name))
    found: set[int] = set()
    waiting = [ancestor]
    while waiting:
        new = children[waiting.pop()]
        found.update(new)
        waiting += new
    return found


def unique(pids: Iterable[int]) -> Unique:
    """The private pages of these processes together.

    A session's first process lets nobody look into it but who owns its sandbox: another user gets `unread` ones.
    """
    size = processes = unread = 0
    for pid in pids:
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except PermissionError:
            unread += 1
            continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        processes += 1
        size += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return Unique(size, processes, unread)
