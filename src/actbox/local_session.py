"""A session of a container in this process: its sockets, and what is told of its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actbox import sessions
from actbox.errors import ConnectionError
from actbox.events import Overrun
from actbox.link import Link
from actbox.protocol import frames
from actbox.sessions import Exit, read_overrun, read_status
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.family import Family
    from actbox.protocol.frames import Frame

logger = logging.getLogger(__name__)

_EXIT_SECONDS = 5.0
# How long an order to kill is waited for to be heeded.
_HEED_SECONDS = 5.0
# The longest pause of the watcher inside, and then some.
_EXCUSE_SECONDS = 3.0
# struct ucred, unix(7): pid, uid, gid of who sent a datagram, as this process's namespaces know them.
_CREDENTIALS = struct.Struct("=III")
_SCM_CREDENTIALS = 2
# Between the deaths of a kernel and of its container, when both are killed at once.
_SUDDEN_SECONDS = 0.05
# Requests that may take the processor's time, each as much as a cell.
_COUNTED = frozenset({"execute", "variables", "get", "set", "save", "restore"})


class LocalSession:
    """A session of a container in this process: two sockets, one straight to a kernel and one to its watcher.

    Args:
        family: what its kernel shares with those that it forks; joined by this, and left by `close`.
        slot: its kernel's number there; 0 for the first.
        remember, forget: told of it now, and when all is over.

    State: `_link` to the kernel; `_watch` to the watcher; `_configured`, whether the kernel was told what to be, or is
    there; `at_work`, whether the kernel owes a reply; `_told`, the limit that its cell was ended for, and `_excused`,
    that of a cell that has ended, and until when; `_killed`, whether that was ordered, and `_gone`, whether the
    container is being closed; `_exit`, set once.
    """

    def __init__(
        self,
        family: Family,
        slot: int,
        remember: Callable[[LocalSession], None],
        forget: Callable[[LocalSession], None],
    ) -> None:
        self.limits = family.limits
        self.slot = slot
        self.at_work = False
        self._family = family
        self._remember = remember
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self.on_overrun: Callable[[Overrun], None] | None = None
        self._grouped: asyncio.Future[None] = self._loop.create_future()
        self._overrun: Overrun | None = None
        self._link: Link | None = None
        self._watch: socket.socket | None = None
        self._configured = False
        self._told: str | None = None
        self._excused = ("", 0.0)
        self._killed = False
        self._gone = False
        self._heeding: asyncio.TimerHandle | None = None
        self._exit: Exit | None = None
        self._exited = asyncio.Event()
        self._oom_kills = oom_kills()
        self._memory_kills = family.group.memory_kills() if family.group is not None else 0
        family.members.add(self)
        remember(self)

    async def start(self, config: dict[str, Any]) -> None:
        """Have the first kernel made, and wait until it is ready."""
        family = self._family
        asking = () if family.way_out is None else (family.way_out.theirs,)
        # Before anybody can speak on it: what is said earlier comes without its sender.
        stream = self._open_sockets(
            lambda *theirs: family.supervision.ask_session(family.number, *theirs, *asking),
            with_sender=family.group is not None,
        )
        for sock in asking:
            sock.close()
        # From before the first cell: what the folder holds then is none of the session's doing.
        family.begin_looking()
        self._link = await Link.over(stream)
        if family.group is not None:
            # Nothing of the guest's own runs before it has read its configuration.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_SECONDS):
                    await self._grouped
        with contextlib.suppress(OSError):
            await self._link.send({"type": "start"}, json.dumps(config).encode())
        self._configured = True
        await sessions.wait_ready(self._link.receive, self._how_it_ended)

    async def branch(self) -> LocalSession:
        """See `Session.branch`."""
        family = self._family
        if self.ended:
            raise ConnectionError("the kernel is gone")
        made = LocalSession(family, family.new_slot(), self._remember, self._forget)
        try:
            stream = made._open_sockets(
                lambda *theirs: family.supervision.ask_fork(family.number, self.slot, made.slot, *theirs)
            )
            made._link = await Link.over(stream)
        except BaseException:
            # In a task of its own: where this one was cancelled, early Pythons 3.11 take a timeout for that.
            await finish(made.close())
            raise
        return made

    async def ready(self) -> None:
        """See `Session.ready`."""
        assert self._link is not None  # noqa: S101 - `branch` made it
        await sessions.wait_ready(self._link.receive, self._how_it_ended)
        self._configured = True

    def _open_sockets(self, ask: Callable[..., None], *, with_sender: bool = False) -> socket.socket:
        """Make the two sockets, and pass their other ends by `ask`; our end of the stream."""
        stream, their_stream = socket.socketpair()
        watch, their_watch = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if with_sender:
            watch.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with their_stream, their_watch:
            try:
                ask(their_stream, their_watch)
            except BaseException:
                stream.close()
                watch.close()
                raise
        watch.setblocking(False)
        self._watch = watch
        self._loop.add_reader(watch, self._hear)
        return stream

    async def _how_it_ended(self) -> str:
        exit_ = await self.exited(_EXIT_SECONDS / 5)
        if exit_ is not None and exit_.gone:
            return ": the container is gone"
        return f" (wait status {exit_.status})" if exit_ is not None else ""

    async def receive(self) -> Frame | None:
        frame = await self._link.receive() if self._link is not None else None
        if frame is not None and frame.header.get("type") == "execute_reply":
            overrun = self._family.kills()
            if overrun is not None:
                self.pass_on(overrun)
            self.at_work = False
            if self._told in ("disk", "files"):
                # What the cell took before it ended may be found out only now, and another cell is not to blame.
                self._excused = self._told, self._loop.time() + _EXCUSE_SECONDS
                if self._family.disk is not None:
                    self._family.disk.excuse()
            self._told = None
        return frame

    async def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if self._link is None:
            raise ConnectionResetError("the session was not started")
        if header.get("type") in _COUNTED and self.limits.cpu is not None:
            self._order({"op": "cell"})
        # Pieces of an upload, or answers to calls, may come behind the reply that has ended it.
        self.at_work = self.at_work or header.get("type") not in ("archive", "archive_end", "call_result")
        await self._link.send(header, payload)

    @property
    def ended(self) -> bool:
        return self._link is None or self._link.ended or self._exit is not None

    def interrupt(self, cell: int) -> None:
        self._order({"op": "interrupt", "cell": cell})

    def kill(self) -> None:
        self._killed = True
        self._order({"op": "kill"})
        if self._exit is not None and self._link is not None:
            # Whoever still holds the other end was said to be dead.
            self._link.close()
        self._family.end()
        if self._exit is None and self._heeding is None:
            self._heeding = self._loop.call_later(_HEED_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """The watcher has not heeded: nobody waits any longer. It may be slow, or the kernel has stopped it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            self._loop.remove_reader(watch)
            self._family.doubt(watch)
        self._note_exit(Exit(killed=True, overrun=self._overrun))
        if self._link is not None:
            self._link.close()

    def _order(self, order: dict[str, Any]) -> None:
        if self._watch is not None:
            with contextlib.suppress(OSError):
                self._watch.send(json.dumps(order).encode())

    def pass_on(self, overrun: Overrun) -> None:
        """Have the cell ended that went over a limit; without one, the session."""
        excused, until = self._excused
        if overrun.limit == excused and self._loop.time() < until:
            self._excused = ("", 0.0)
        elif self.at_work and self.on_overrun is not None:
            self._told = overrun.limit
            self.on_overrun(overrun)
        else:
            self._overrun = overrun
            self.kill()

    async def exited(self, timeout: float) -> Exit | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._exited.wait()
        return self._exit

    async def close(self) -> None:
        if not self._configured and self._link is not None:
            # The watcher waits for its configuration, and heeds nothing else.
            self._link.close()
        if not self._configured and self.slot:
            # Or it waits for a kernel to come, which it kills then.
            self._stop_hearing()
        if self._exit is None and self._watch is not None:
            self.kill()
            await self.exited(_EXIT_SECONDS)
        # A watcher that has not ended until now ends with the last of these sockets.
        self._stop_hearing()
        if self._link is not None:
            self._link.close()
        await self._family.leave(self)
        self._forget(self)

    def container_gone(self) -> None:
        """The container is being closed: whatever runs is lost."""
        with contextlib.suppress(RuntimeError):
            # The client's loop may be another thread's, or closed: then nobody waits.
            self._gone = True
            self._loop.call_soon_threadsafe(self._note_exit, Exit(gone=True))

    def _hear(self) -> None:
        """What the watcher says: of a limit that was passed, at last how the kernel ended; or the watcher's own end."""
        data = b""
        ancillary: list[tuple[int, int, bytes]] = []
        with contextlib.suppress(BlockingIOError, OSError):
            if self._watch is not None:
                # Room for credentials would hold descriptors too, where the system sends none.
                room = 0 if self._family.group is None else socket.CMSG_SPACE(_CREDENTIALS.size)
                data, ancillary, _, _ = self._watch.recvmsg(4096, room)
        news: dict[str, Any] = {}
        try:
            news = frames.parse_header(data) if data else {}
        except frames.FrameError as exc:
            # It is of no more use: its socket is closed below, which ends it.
            logger.error("a session's watcher broke the rules, and is taken for gone: %s", exc)  # noqa: TRY400 - no bug of ours
            data = b""
        if "hello" in news:
            self._join(ancillary)
            return
        if "over" in news:
            overrun = read_overrun(news["over"], self.limits)
            if overrun is not None:
                self.pass_on(overrun)
            return
        self._stop_hearing()
        begun = news.get("begun")
        exit_ = Exit(
            read_status(news.get("status")),
            begun if type(begun) is int and begun >= 0 else None,
            killed=self._killed or news.get("killed") is True,
            overrun=read_overrun(news.get("limit"), self.limits) or self._overrun,
        )
        # Who was killed: by itself, by the system, or by whoever is just now killing the whole container. A watcher
        # that is alone there with its kernel, and could still tell of that, tells it all.
        sudden = not data or (_was_killed(exit_) and not self._family.is_alone)
        if sudden and not exit_.killed and exit_.overrun is None:
            self._loop.call_later(_SUDDEN_SECONDS, self._note_end, exit_)
        else:
            self._note_end(exit_)

    def _note_end(self, exit_: Exit) -> None:
        answers = exit_.killed or exit_.overrun is not None or self._family.supervision.answers()
        self._note_exit(exit_ if answers else Exit(gone=True))
        self._family.end()

    def _join(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Put the watcher, and with it all that it will start, into the session's group."""
        group = self._family.group
        if group is None or self._grouped.done():
            return
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                pid = _CREDENTIALS.unpack_from(data)[0]
                if not pid:
                    continue
                try:
                    group.add(pid)
                except ProcessLookupError:
                    pass  # it has ended, and will say so
                except OSError as exc:
                    logger.warning("a session cannot be put into its control group: %s", exc)
        self._grouped.set_result(None)

    def _stop_hearing(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            self._loop.remove_reader(watch)
            watch.close()

    def _note_exit(self, exit_: Exit) -> None:
        group = self._family.group
        # The system takes the watcher too, if what it has killed for memory is slow to go.
        unknown = exit_.status is None and not exit_.killed and not exit_.gone
        sudden = (_was_killed(exit_) or unknown) and exit_.overrun is None
        if sudden and group and group.memory_kills() > self._memory_kills:
            exit_ = replace(exit_, overrun=Overrun("memory", self.limits.memory, group.peak()))
        # A kernel may kill itself; that the machine killed something for memory meanwhile tells the other case.
        if _was_killed(exit_) and exit_.overrun is None and oom_kills() > self._oom_kills:
            exit_ = replace(exit_, memory_limit=self.limits.memory)
        if self._heeding is not None:
            self._heeding.cancel()
            self._heeding = None
        if self._exit is None:
            self._exit = Exit(gone=True) if self._gone else exit_
            self._exited.set()


def _was_killed(exit_: Exit) -> bool:
    """Whether SIGKILL ended the kernel, and not on the host's word."""
    status = exit_.status
    return not exit_.killed and status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def oom_kills() -> int:
    """How often this machine has killed a process for memory since it started; 0 where it does not tell."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:  # noqa: PTH123 - read at each start
        found = re.search(rb"^oom_kill (\d+)$", file.read(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0
