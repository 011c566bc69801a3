"""The watcher of a session: what process B of `session` does once the first kernel runs.

A session has one kernel, and as many more as were forked from it. With each the watcher shares a slot (`interrupts`),
a socket to the kernel (`kin`), and a socket to the host (`watch`): there come the orders to interrupt and to kill, and
there goes the news of the kernel's end. The sockets of a kernel that is to be forked come from the supervisor, and go
on to the kernel that forks; the new one says on its own `kin` that it is there, and the system tells who says it.

The guest has the watcher's user, but cannot look into it: what it sends is believed no further than that it wants to
be forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import interrupts, usage

if TYPE_CHECKING:
    import mmap

DATAGRAM = 4096
# struct ucred, unix(7): pid, uid, gid.
_CREDENTIALS = struct.Struct("=III")
_SCM_CREDENTIALS = 2
# After so many looks that find nothing of an ended kernel there is nothing: who forks without end slips through one.
_CLEAN_LOOKS = 3


@dataclass(eq=False)
class Kin:
    """One kernel as its watcher knows it. `pid` is 0 until it is there; `reminders`, when to interrupt it again."""

    number: int
    slot: memoryview
    watch: socket.socket
    kin: socket.socket
    pid: int = 0
    killed: bool = False
    limit: dict[str, Any] | None = None
    reminders: list[float] = field(default_factory=list[float])


class Watcher:
    """See the module's text.

    Args:
        memory: the kernels' slots.
        handover: where the sockets of kernels that are to be forked come from.
        children: becomes readable when a child ends.
        meter: what the session uses.

    State: `_kernels`, those that live or are expected, by the numbers of their slots; `_leftovers`, how often the
    terminal sessions of ended ones are looked at yet; when to look at what they use.
    """

    def __init__(self, memory: mmap.mmap, handover: socket.socket, children: int, meter: usage.Meter) -> None:
        self._memory = memory
        self._handover = handover
        self._children = children
        self._meter = meter
        self._kernels: dict[int, Kin] = {}
        self._leftovers: dict[int, int] = {}
        self._poller = select.poll()
        self._poller.register(handover, select.POLLIN)
        self._poller.register(children, select.POLLIN)
        self._deadline = 0.0

    def add(self, number: int, watch: socket.socket, kin: socket.socket, pid: int = 0) -> None:
        """Watch a kernel, from before it is there if it has no pid yet."""
        kernel = Kin(number, interrupts.slot(self._memory, number), watch, kin, pid)
        self._kernels[number] = kernel
        self._poller.register(watch, select.POLLIN)
        if pid:
            kin.shutdown(socket.SHUT_RD)
        else:
            kin.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._poller.register(kin, select.POLLIN)

    def run(self) -> None:
        """Serve the host's orders until the last kernel or the host is gone; tell the host how each kernel ended.

        Look meanwhile at what the session uses. Memory beyond its bound ends a kernel at once; processor time is told
        to the host, which interrupts the cell.
        """
        self._plan_look()
        while self._kernels:
            events = self._poller.poll(max(0, 1000 * (self._next_time() - monotonic())))
            self._remind()
            if monotonic() >= self._deadline:
                self._look()
                self._plan_look()
            for fd, _ in events:
                if fd == self._children:
                    self._reap()
                elif fd == self._handover.fileno():
                    if not self._take_request():
                        return
                else:
                    self._serve(fd)

    def _serve(self, fd: int) -> None:
        for kernel in self._kernels.values():
            if fd == kernel.watch.fileno():
                self._take_order(kernel)
                return
            if fd == kernel.kin.fileno():
                self._hear(kernel)
                return

    def _next_time(self) -> float:
        """When there is something to do though nothing comes."""
        return min([self._deadline, *(time for kernel in self._kernels.values() for time in kernel.reminders)])

    def _remind(self) -> None:
        for kernel in self._kernels.values():
            if kernel.reminders and monotonic() >= kernel.reminders[0]:
                del kernel.reminders[0]
                interrupts.remind(kernel.slot, kernel.pid)

    # -- the host ------------------------------------------------------------------------------------------------

    def _take_order(self, kernel: Kin) -> None:
        if not self._is_there(kernel):
            return
        order = b""
        try:
            order = kernel.watch.recv(DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass
        match json.loads(order) if order else None:
            case {"op": "interrupt"} if not kernel.pid:
                pass  # it runs no cell yet
            case {"op": "interrupt", "cell": int(cell)}:
                interrupts.set_target(kernel.slot, cell)
                interrupts.forward(kernel.slot, kernel.pid)
                kernel.reminders = [monotonic() + seconds for seconds in interrupts.REMINDERS]
            case {"op": "cell"}:
                self._meter.begin_cell(self._pids(), kernel.pid)
                self._plan_look()
            case _:
                # That is an order to kill it, or the host has let go of it.
                if not order:
                    self._poller.unregister(kernel.watch)
                    if not kernel.pid:
                        # Whoever holds its sockets may never say so, and must not keep the session for ever.
                        self._forget(kernel)
                        return
                kernel.killed = True
                self._kill(kernel)

    def _take_request(self) -> bool:
        """Pass on the sockets of a kernel to be forked; False once the supervisor is gone."""
        data, fds, _, _ = socket.recv_fds(self._handover, DATAGRAM, 2, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        sockets = [socket.socket(fileno=fd) for fd in fds]
        request: dict[str, Any] = json.loads(data)
        source = self._kernels.get(request["source"])
        number: int = request["number"]
        may_be = source is not None and self._is_there(source) and source.pid and number not in self._kernels
        if source is not None and may_be and len(sockets) == 2:  # noqa: PLR2004
            stream, watch = sockets
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with stream, theirs:
                interrupts.clear(interrupts.slot(self._memory, number))
                self.add(number, watch, ours)
                with contextlib.suppress(OSError):
                    socket.send_fds(
                        source.kin, [b"%d" % number], [stream.fileno(), theirs.fileno()], socket.MSG_DONTWAIT
                    )
            return True
        for sock in sockets:
            sock.close()
        return True

    def _is_there(self, kernel: Kin) -> bool:
        """Whether a kernel is expected yet, or is there: it says so before the host can ask for more."""
        if not kernel.pid:
            self._hear(kernel)
        return self._kernels.get(kernel.number) is kernel

    # -- the kernels ---------------------------------------------------------------------------------------------

    def _pids(self) -> list[int]:
        return [kernel.pid for kernel in self._kernels.values() if kernel.pid]

    def _hear(self, kernel: Kin) -> None:
        """A kernel that was expected says that it is there; the end of its socket, that it will not come."""
        if kernel.pid:
            # Heard of already, when something else was asked; one look at the sockets may tell of both.
            return
        data, ancillary = b"", []
        try:
            data, ancillary, _, _ = kernel.kin.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass
        if not data:
            self._forget(kernel)
            return
        for level, kind, told in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                pid = _CREDENTIALS.unpack_from(told)[0]
                if pid > os.getpid() and pid not in self._pids():
                    kernel.pid = pid
                    self._poller.unregister(kernel.kin)
                    kernel.kin.shutdown(socket.SHUT_RD)
                    if kernel.killed:
                        self._kill(kernel)
                    return

    def _reap(self) -> None:
        """Collect the children that have ended: kernels, and orphans of theirs."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._children, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._note_end(pid, status)

    def _note_end(self, pid: int, status: int) -> None:
        for kernel in list(self._kernels.values()):
            if not kernel.pid:
                # It may have said that it is there, and ended since.
                self._hear(kernel)
            if kernel.pid == pid:
                self._end(kernel, status)
                return

    def _kill(self, kernel: Kin) -> None:
        if not kernel.pid:
            # It is killed as soon as it is there, if it comes at all.
            return
        belongings = self._belongings(kernel)
        if belongings:
            # Together, before any of them has made room for another.
            usage.end_terminal(kernel.pid, os.getpid())
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel.pid, signal.SIGKILL)
        _kill_all(belongings)
        try:
            os.waitid(os.P_PID, kernel.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Whoever said it was the kernel is no child of ours: nobody will tell of its end.
            self._end(kernel, signal.SIGKILL)

    def _end(self, kernel: Kin, status: int) -> None:
        """Tell the host how a kernel has ended. What it leaves behind goes with it, or else with the session."""
        belongings = self._belongings(kernel)
        begun = interrupts.begun(kernel.slot)
        tell(kernel.watch, {"status": status, "killed": kernel.killed, "begun": begun, "limit": kernel.limit})
        self._meter.forget(kernel.pid)
        self._forget(kernel)
        self._leftovers[kernel.pid] = _CLEAN_LOOKS
        if self._kernels:
            self._end_leftovers()
        _kill_all(belongings)

    def _end_leftovers(self) -> None:
        """Kill what ended kernels have left in their terminal sessions."""
        for terminal in list(self._leftovers):
            if terminal in self._pids():
                del self._leftovers[terminal]  # the number is another's by now
            elif usage.end_terminal(terminal, os.getpid()):
                self._leftovers[terminal] = _CLEAN_LOOKS
            else:
                self._leftovers[terminal] -= 1
                if not self._leftovers[terminal]:
                    del self._leftovers[terminal]

    def _belongings(self, kernel: Kin) -> list[int]:
        others = [pid for pid in self._pids() if pid != kernel.pid]
        if not others:
            # All that is left ends with this process.
            return []
        return usage.belongings(kernel.pid, [*others, kernel.pid], os.getpid())

    def _forget(self, kernel: Kin) -> None:
        del self._kernels[kernel.number]
        for sock in (kernel.watch, kernel.kin):
            with contextlib.suppress(KeyError):
                self._poller.unregister(sock)
            sock.close()

    # -- what they use -------------------------------------------------------------------------------------------

    def _plan_look(self) -> None:
        self._deadline = monotonic() + self._meter.pause / 1000

    def _look(self) -> None:
        self._end_leftovers()
        pids = self._pids()
        over = self._meter.look(pids)
        if over is None:
            return
        found = {"limit": over.name, "use": over.use}
        if over.name == "memory":
            kernel = self._heaviest()
            if kernel is not None:
                kernel.limit = found
                self._kill(kernel)
            return
        at_work = [kernel for kernel in self._kernels.values() if kernel.pid and interrupts.running(kernel.slot)]
        for kernel in at_work or [kernel for kernel in self._kernels.values() if kernel.pid][:1]:
            if over.kernel in (0, kernel.pid):
                tell(kernel.watch, {"over": found})

    def _heaviest(self) -> Kin | None:
        """Whom to end when the session takes too much memory: of those that run a cell, who takes most."""
        there = [kernel for kernel in self._kernels.values() if kernel.pid]
        at_work = [kernel for kernel in there if interrupts.running(kernel.slot)] or there
        return max(at_work, key=lambda kernel: usage.weight(kernel.pid) if len(at_work) > 1 else 0, default=None)


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def tell(watch: socket.socket, news: dict[str, Any]) -> None:
    """A datagram for the host, if it still listens."""
    with contextlib.suppress(OSError):
        watch.send(json.dumps(news).encode())
