"""A kernel forks: the copy has every variable and import, shares memory until one of the two writes, and goes on alone.

It is forked twice, and the one between ends at once, so that the watcher becomes the parent of the new kernel as it is
that of the first. What a fork cannot copy is refused by name: other threads, asyncio tasks, running subprocesses.
Open files, and the session's folders and processes, are shared between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from .places import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

_HANDOVER_SECONDS = 5.0
_NUMBER = 16
_MOST_NAMED = 10
_LOOKS = 5
_LOOK_SECONDS = 0.005
# Loops of the parent's: to collect them would take out of their shared selector what the parent waits for.
_kept: list[object] = []


class Sockets:
    """What the watcher gives for a kernel to be forked: its stream to the host, and its own socket to the watcher."""

    def __init__(self, stream: socket.socket, kin: socket.socket) -> None:
        self.stream = stream
        self.kin = kin

    def close(self) -> None:
        """Close both here."""
        self.stream.close()
        self.kin.close()


def take_sockets(kin: socket.socket, number: int) -> Sockets:
    """The sockets of the kernel that is to have this number.

    Raises:
        Refused: the host did not send them.
    """
    poller = select.poll()
    poller.register(kin, select.POLLIN)
    while poller.poll(1000 * _HANDOVER_SECONDS):
        data, fds, _, _ = socket.recv_fds(kin, _NUMBER, 2, socket.MSG_CMSG_CLOEXEC)
        if not data:
            break
        sockets = [socket.socket(fileno=fd) for fd in fds]
        if len(sockets) == 2 and data == b"%d" % number:  # noqa: PLR2004
            return Sockets(*sockets)
        # Of a fork that the host gave up.
        for sock in sockets:
            sock.close()
    raise Refused("the host gave no connection for it")


def check_forkable(own_threads: set[str], loop: asyncio.AbstractEventLoop | None) -> None:
    """Raises `Refused` with the names of what a copy would miss."""
    found = [*_threads(own_threads), *_tasks(loop), *_subprocesses()]
    if found:
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise Refused(
            f"a fork would not copy {', '.join(found[:_MOST_NAMED])}{more}: end them, or pass force=True and have the "
            "branch go without them"
        )


def _threads(own: set[str]) -> Iterator[str]:
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name not in own:
            yield f"the thread {thread.name[:60]!r}"
    for _ in range(_LOOKS):
        if not _nameless():
            return
        # One that has just ended may not be gone from where this looks.
        time.sleep(_LOOK_SECONDS)
    for ident in _nameless():
        yield f"the thread {ident}, which has no name"


def _nameless() -> list[int]:
    """Threads that run Python code, and that `threading` does not know: of `_thread`, or of a library's own."""
    known = {thread.ident for thread in threading.enumerate()}
    frames = sys._current_frames()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return [ident for ident in frames if ident not in known]


def _tasks(loop: asyncio.AbstractEventLoop | None) -> Iterator[str]:
    for task in asyncio.all_tasks(loop) if loop is not None else ():
        if not task.done():
            yield f"the asyncio task {task.get_name()[:60]!r}"


def _subprocesses() -> Iterator[str]:
    own = os.getpid()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/stat", "rb") as file:
                head, _, rest = file.read().rpartition(b")")
            state, parent = rest.split()[:2]
            if int(parent) == own and state not in (b"Z", b"X"):
                command = head.partition(b"(")[2].decode("utf-8", "replace")
                yield f"the running subprocess {int(name)} ({command})"


def fork() -> bool:
    """Make the copy; True in it, False in this process.

    Raises:
        OSError: the system gives no more processes; nothing was made.
    """
    between = os.fork()
    if between:
        _wait(between)
        return False
    try:
        if os.fork():
            os._exit(0)
    except OSError as exc:
        os._exit(exc.errno or 1)
    except BaseException:  # noqa: BLE001 - a hook that the guest's code has registered
        os._exit(1)
    return True


def _wait(between: int) -> None:
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(between, 0)[1])
    except ChildProcessError:
        # The guest's code ignores SIGCHLD: then nobody learns how a child has ended.
        return
    if status:
        raise OSError(status, os.strerror(status)) if status > 1 else OSError("the copy could not be made")


def start_over() -> None:
    """Make this process a kernel of its own: a terminal session, standard output, randomness, no loop of the parent's.

    Python seeds `random` itself after a fork. Generators that the session has made are variables like others, and
    the same in both.
    """
    os.setsid()
    _leave_loop()
    random.seed()
    for module in ("numpy.random", "torch"):
        loaded: Any = sys.modules.get(module)
        with contextlib.suppress(Exception):
            loaded.seed()


def _leave_loop() -> None:
    """Have the shell make a loop of its own. The parent's waits for its files in the same system object as ours."""
    from IPython.core import async_helpers

    for name in ("_event_loop", "_asyncio_event_loop"):
        loop: Any = getattr(async_helpers, name, None)
        if loop is None:
            continue
        _kept.append(loop)
        setattr(async_helpers, name, None)
        # The descriptors alone: an orderly close would change what the parent's loop waits for.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            for fd in (loop._selector.fileno(), loop._ssock.fileno(), loop._csock.fileno()):  # noqa: SLF001
                os.close(fd)
    with contextlib.suppress(Exception):
        asyncio.set_event_loop(None)
