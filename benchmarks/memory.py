"""What processes hold for themselves alone, read from /proc."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROC = Path("/proc")


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


def unique(pids: Iterable[int]) -> dict[int, int | None]:
    """The bytes of each process's private pages, by its pid; None where this user may not look, gone ones left out.

    A session's first process lets nobody look into it but who owns its sandbox.
    """
    held: dict[int, int | None] = {}
    for pid in pids:
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except PermissionError:
            held[pid] = None
        except (FileNotFoundError, ProcessLookupError):
            continue
        else:
            held[pid] = 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return held
