"""The first process of a container: trusted, single-threaded, never runs the guest's code.

It imports the libraries once, then forks a process for every session that the host asks for, passes signals on, and
says how each session ended. The host speaks to it in datagrams over one socket; when that socket ends, so does it, and
with it the whole container.

State: the `_Session` of each running session by its number, the modules still to be preloaded, and whether all that
can be done ahead is done.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from . import interrupts, isolation, seccomp
from .caches import plant

if TYPE_CHECKING:
    from types import FrameType

    from .reload import SkillReloader
    from .shell import Shell

_DATAGRAM = 64 << 10
_PROBE_SECONDS = 10


class _Session:
    """A session as the supervisor sees it: the pid of its first process, and how its kernel ended."""

    def __init__(self, number: int, first: int, status: int, page: mmap.mmap) -> None:
        self.number = number
        self.first: int | None = first
        self.status = status
        self.page = page
        self.pid: int | None = None
        self.wait_status: int | None = None
        self.killed = False
        self.rest = b""


class Supervisor:
    """See the module's text."""

    def __init__(self, control: socket.socket, layout: dict[str, Any]) -> None:
        self._control = control
        self._binds: list[dict[str, Any]] = layout["binds"]
        self._preload: list[str] = list(layout["preload"])
        self._warm = False
        self._nested: bool = layout["nested"]
        self._seeds: list[list[str]] = layout["seeds"]
        self._sessions: dict[int, _Session] = {}
        self._shell: Shell
        self._reloader: SkillReloader
        self._children, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_child)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._poller.register(self._children, select.POLLIN)

    def run(self) -> None:
        """Serve the host until it closes the control socket."""
        began = time.monotonic()
        refusal = probe_nesting(self._binds) if self._nested else None
        if refusal is not None:
            # The host starts another container for each session instead; this one is of no use.
            self._send({"op": "no-nesting", "layer": refusal.layer, "errno": refusal.errno, "detail": refusal.detail})
            return
        plant(self._seeds)
        from .reload import SkillReloader
        from .shell import make_shell

        self._shell = make_shell()
        self._reloader = SkillReloader(self._shell)
        if not self._nested:
            # A container of one session: nobody else to serve while the libraries load.
            while not self._warm:
                self._work_ahead()
            isolation.set_dumpable(value=False)
        gc.collect()
        gc.freeze()
        self._send({"op": "ready", "seconds": time.monotonic() - began, "python": sys.version.split()[0]})
        while True:
            for fd, _ in self._poller.poll(None if self._warm else 0):
                if fd == self._control.fileno():
                    if not self._serve_request():
                        return
                elif fd == self._children:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._children, 4096)
                    self._reap()
                else:
                    self._read_status(fd)
            if not self._warm:
                self._work_ahead()

    def _work_ahead(self) -> None:
        """Do for all sessions to come what each would have to do: import one library, or at last warm up the shell."""
        if self._preload:
            module = self._preload.pop(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(module)
            except Exception as exc:  # noqa: BLE001 - an import may raise anything; sessions can do without it
                self._send({"op": "preload-failed", "module": module, "error": repr(exc)[:500]})
            return
        from .shell import warm_up

        warm_up(self._shell)
        self._warm = True
        gc.collect()
        gc.freeze()
        self._send({"op": "warm"})

    # -- the host's requests -------------------------------------------------------------------------------------

    def _serve_request(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, _DATAGRAM, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return False
        request: dict[str, Any] = json.loads(message)
        match request["op"]:
            case "session":
                self._start_session(request["session"], socket.socket(fileno=fds[0]))
            case "interrupt":
                self._interrupt(request["session"], request["cell"])
            case "kill":
                self._kill(request["session"])
            case _:
                for fd in fds:
                    os.close(fd)
        return True

    def _start_session(self, number: int, stream: socket.socket) -> None:
        from .session import Start, run_first

        page = mmap.mmap(-1, interrupts.PAGE)
        status, writer = os.pipe2(os.O_CLOEXEC)
        start = Start(stream, writer, page, self._binds, self._seeds, self._shell, self._reloader, nested=self._nested)
        with warnings.catch_warnings():
            # Libraries may hold threads of their own (OpenBLAS does); they restart them after a fork.
            warnings.simplefilter("ignore")
            first = os.fork()
        if first == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            run_first(start)
        os.close(writer)
        stream.close()
        session = _Session(number, first, status, page)
        self._sessions[number] = session
        self._poller.register(status, select.POLLIN)

    def _interrupt(self, number: int, cell: int) -> None:
        session = self._sessions.get(number)
        if session is None or session.pid is None:
            return
        interrupts.set_target(session.page, cell)
        with contextlib.suppress(ProcessLookupError):
            os.kill(session.pid, signal.SIGINT)

    def _kill(self, number: int) -> None:
        session = self._sessions.get(number)
        if session is not None:
            session.killed = True
        if not self._nested:
            self._kill_all()
        for pid in (session.first, session.pid) if session is not None else ():
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # -- what became of the sessions -----------------------------------------------------------------------------

    def _read_status(self, fd: int) -> None:
        session = next((session for session in self._sessions.values() if session.status == fd), None)
        if session is None:
            self._poller.unregister(fd)
            return
        data = os.read(fd, 4096)
        session.rest += data
        while b"\n" in session.rest:
            line, session.rest = session.rest.split(b"\n", 1)
            fact: dict[str, int] = json.loads(line)
            session.pid = fact.get("pid", session.pid)
            session.wait_status = fact.get("status", session.wait_status)
            if session.killed and session.pid is not None:
                self._kill(session.number)
        if not data:
            self._poller.unregister(fd)
            os.close(fd)
            session.status = -1
            self._finish(session)

    def _finish(self, session: _Session) -> None:
        """Nobody holds the status pipe any more: the watcher is gone, and with it, if nested, the whole session."""
        if not self._nested:
            self._kill_all()
        del self._sessions[session.number]
        self._send(
            {
                "op": "exited",
                "session": session.number,
                "status": session.wait_status,
                "killed": session.killed,
                "begun": interrupts.begun(session.page),
            }
        )
        session.page.close()
        self._reap()

    def _kill_all(self) -> None:
        """End everything in this container but this process: pid 1's `kill(-1)` reaches all others.

        Where a session has no pid namespace of its own, its kernel can kill or stop the process that watches it.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    def _reap(self) -> None:
        """Collect every child that has ended; as pid 1 of the container this process inherits orphans too."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                # From here on the number may be another process's: it must not be signalled any more.
                for session in self._sessions.values():
                    if session.pid == pid:
                        session.pid = None
                    elif session.first == pid:
                        session.first = None

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(message).encode())


def _note_child(_number: int, _frame: FrameType | None) -> None:
    """A handler must stand for the wake-up descriptor to be written to."""


def probe_nesting(binds: list[dict[str, Any]]) -> isolation.LayerError | None:
    """Try in a child whether this container can hold isolated sessions; None if it can."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    first = os.fork()
    if first == 0:
        answer: list[Any] | None = None
        try:
            isolation.enter_namespaces()
            second = os.fork()
            if second == 0:
                _probe_inner(writer, binds)
            os.waitpid(second, 0)
            os._exit(0)
        except isolation.LayerError as exc:
            answer = [exc.layer, exc.errno, exc.detail]
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the child ends here
            answer = ["nested namespaces", getattr(exc, "errno", None), repr(exc)]
        finally:
            if answer is not None:
                os.write(writer, json.dumps(answer).encode())
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], _PROBE_SECONDS)
    data = os.read(reader, 65536) if ready else b""
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    if data == b"null":
        return None
    layer, number, detail = json.loads(data) if data else ("nested namespaces", None, "the probe gave no answer")
    return isolation.LayerError(layer, number, detail)


def _probe_inner(writer: int, binds: list[dict[str, Any]]) -> None:
    answer: list[Any] | None = None
    try:
        isolation.build_root(binds, None, {"tmp": 1 << 20, "shm": 1 << 16})
        isolation.raise_loopback()
        isolation.give_up_rights()
    except isolation.LayerError as exc:
        answer = [exc.layer, exc.errno, exc.detail]
    except BaseException as exc:  # noqa: BLE001 - see probe_nesting
        answer = ["session root", getattr(exc, "errno", None), repr(exc)]
    finally:
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)


def main() -> None:
    """Entry: `main(control descriptor)`, given in argv; the first datagram holds the container's layout."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    layout = json.loads(control.recv(_DATAGRAM))
    with contextlib.suppress(ValueError):
        # The place of this package is no place for the guest's imports.
        sys.path.remove(layout["guest_path"])
    sys.path.extend(layout["extra_path"])
    try:
        seccomp.install("outer")
    except (OSError, RuntimeError) as exc:
        control.send(json.dumps({"op": "failed", "layer": "seccomp", "errno": None, "detail": str(exc)}).encode())
        return
    try:
        Supervisor(control, layout).run()
    except ImportError as exc:
        detail = f"{exc}"
        control.send(json.dumps({"op": "failed", "layer": "IPython", "errno": None, "detail": detail}).encode())
