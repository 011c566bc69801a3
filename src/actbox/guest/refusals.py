"""Which limit it was that an exception of the user's code came from, as far as the system tells; the guest's word."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from typing import Any

_PAGE = resource.getpagesize()
_BOUNDED = (("tmp", "/tmp"), ("shm", "/dev/shm"), ("tmp", "/app"))
_MOST_LINKS = 16  # of a chain of exceptions, which may be endless


def refused_by(error: BaseException, limits: dict[str, Any]) -> dict[str, Any] | None:
    """The limit behind an exception, `{"limit", "use"}`; None if there is none.

    An error that has other causes as well counts only where the limit is in fact used up.
    """
    with contextlib.suppress(Exception):
        seen: set[int] = set()
        link: BaseException | None = error
        while link is not None and id(link) not in seen and len(seen) < _MOST_LINKS:
            seen.add(id(link))
            found = _of_one(link, limits)
            if found is not None:
                return {"limit": found[0], "use": found[1]}
            link = link.__cause__ or link.__context__
    return None


def _of_one(error: BaseException, limits: dict[str, Any]) -> tuple[str, int] | None:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "memory", _private_memory()
    if number == errno.EMFILE:
        return "open_files", limits["open_files"]
    if number == errno.EFBIG:
        return "file_size", limits["file_size"]
    if number == errno.ENOSPC:
        full = next((name for name, place in _BOUNDED if _is_full(place, limits[name])), None)
        return (full, limits[full]) if full is not None else None
    no_thread = isinstance(error, RuntimeError) and "start new thread" in str(error)
    if number == errno.EAGAIN or no_thread:
        # A socket without data says the same; then there is room for more processes.
        tasks = _tasks()
        if tasks >= limits["pids"] - 1:
            return "pids", tasks
        memory = _private_memory()
        return ("memory", memory) if no_thread and memory + _stack() > limits["memory"] else None
    return None


def _stack() -> int:
    """Bytes that a new thread asks for."""
    bound = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return threading.stack_size() or (bound if bound != resource.RLIM_INFINITY else 2 << 20)


def _private_memory() -> int:
    # data and stack, proc(5): what RLIMIT_DATA bounds.
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * _PAGE


def _is_full(place: str, size: int) -> bool:
    room = os.statvfs(place)
    # /app may be something larger: then it is not bounded by this limit.
    is_ours = room.f_blocks * room.f_frsize <= size + _PAGE
    return is_ours and (room.f_bavail * room.f_frsize < _PAGE or room.f_favail == 0)


def _tasks() -> int:
    total = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                total += len(os.listdir(f"/proc/{name}/task"))
    return total
