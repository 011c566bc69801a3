"""The first process of a container: trusted, single-threaded, never runs the guest's code.

It imports the libraries once, then forks a process for every session that the host asks for, one ahead of need. It has
no part in what becomes of them: host and session speak over sockets of their own (see `session`), and all that comes
through here later are the sockets of kernels that a session is to fork. The host speaks to it in datagrams over one
socket; when that socket ends, so does it, and with it the whole container.

State: the modules still to be preloaded, whether all that can be done ahead is done, until when no import is begun, the
session in store, and a socket to each session that lives, by the number that the host gave it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from . import isolation, seccomp
from .caches import plant

if TYPE_CHECKING:
    from types import FrameType

    from .reload import SkillReloader
    from .shell import Shell

_DATAGRAM = 64 << 10
_PROBE_SECONDS = 10
_PATIENCE_MILLISECONDS = 50
# A session that is opened before the libraries are loaded imports what it needs itself. To import the same beside it
# would slow it down: that waits so long after each request, and so long in all.
_QUIET_SECONDS = 1.0
_QUIET_SECONDS_IN_ALL = 3.0


class Supervisor:
    """See the module's text."""

    def __init__(self, control: socket.socket, layout: dict[str, Any], host: int | None) -> None:
        self._control = control
        self._binds: list[dict[str, Any]] = layout["binds"]
        self._preload: list[str] = list(layout["preload"])
        self._demanded: bool = layout["demanded"]
        self._warm = False
        self._nested: bool = layout["nested"]
        self._seeds: list[list[str]] = layout["seeds"]
        self._spare: socket.socket | None = None
        self._sessions: dict[int, socket.socket] = {}
        self._quiet_until = 0.0
        self._shell: Shell
        self._reloader: SkillReloader
        self._children, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_child)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._poller.register(self._children, select.POLLIN)
        if host is not None:
            self._poller.register(host, select.POLLIN)

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
        # What each session would have to assemble anew.
        seccomp.assembled("inner", os.uname().machine)
        gc.collect()
        gc.freeze()
        self._send({"op": "ready", "seconds": time.monotonic() - began, "python": sys.version.split()[0]})
        self._wait_for_first()
        latest = time.monotonic() + _QUIET_SECONDS_IN_ALL
        while True:
            idle = self._warm and (self._spare is not None or not self._nested)
            pause = 0.0 if self._warm else max(0.0, min(self._quiet_until, latest) - time.monotonic())
            events = self._poller.poll(None if idle else 1000 * pause)
            for fd, _ in events:
                if fd == self._children:
                    self._reap()
                elif fd == self._control.fileno():
                    if not self._serve_request():
                        return
                elif not self._forget(fd):
                    return
            if not self._warm:
                if time.monotonic() >= min(self._quiet_until, latest):
                    self._work_ahead()
            elif not events and self._spare is None and self._nested:
                self._spare = self._fork_session()

    def _wait_for_first(self) -> None:
        """Let the first request come before a long import is begun, and meanwhile load what it needs."""
        importlib.import_module(".session", __package__)
        patience = select.poll()
        patience.register(self._control, select.POLLIN)
        patience.poll(_PATIENCE_MILLISECONDS)

    def _work_ahead(self) -> None:
        """Do for all sessions to come what each would have to do: import one library, or at last warm up the shell."""
        if self._preload:
            module = self._preload.pop(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(module)
            except Exception as exc:  # noqa: BLE001 - an import may raise anything; sessions can do without it
                if not self._demanded and isinstance(exc, ModuleNotFoundError):
                    return
                self._send({"op": "preload-failed", "module": module, "error": repr(exc)[:500]})
            return
        from .shell import warm_up

        warm_up(self._shell)
        self._warm = True
        if sys.version_info < (3, 12):
            # It owns references to names, which sessions would drop one by one, copying the page of each.
            sys._clear_type_cache()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        gc.collect()
        gc.freeze()
        self._send({"op": "warm"})

    def _serve_request(self) -> bool:
        """Hand a session's sockets to a process that was forked for it; False once the host is gone."""
        message, fds, _, _ = socket.recv_fds(self._control, _DATAGRAM, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return False
        match json.loads(message):
            case {"op": "fork", "session": int(number)}:
                session = self._sessions.get(number)
                if session is not None:
                    # One that has ended, or does not read, gets nothing; the host sees that these sockets end.
                    with contextlib.suppress(OSError):
                        socket.send_fds(session, [message], fds, socket.MSG_DONTWAIT)
            case {"op": "session", "number": int(number)}:
                self._start_session(number, fds)
            case _:
                pass
        for fd in fds:
            os.close(fd)
        return True

    def _start_session(self, number: int, fds: list[int]) -> None:
        self._quiet_until = time.monotonic() + _QUIET_SECONDS
        session, self._spare = self._spare or self._fork_session(), None
        try:
            socket.send_fds(session, [b"s"], fds)
        except OSError:
            # The one in store has ended, by the system's doing: a fresh one can say why if it ends too.
            session.close()
            session = self._fork_session()
            with contextlib.suppress(OSError):
                socket.send_fds(session, [b"s"], fds)
        self._sessions[number] = session
        # Nothing comes there but its end.
        self._poller.register(session, select.POLLIN)

    def _forget(self, fd: int) -> bool:
        """Let go of the session whose socket has ended; False if it is no session's."""
        for number, session in self._sessions.items():
            if session.fileno() == fd:
                self._poller.unregister(session)
                session.close()
                del self._sessions[number]
                return True
        return False

    def _fork_session(self) -> socket.socket:
        """A session's first process, waiting for its sockets at the other end."""
        from .session import Start, run_first

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start = Start(theirs, self._binds, self._seeds, self._shell, self._reloader, self._nested)
        with warnings.catch_warnings():
            # Libraries may hold threads of their own (OpenBLAS does); they restart them after a fork.
            warnings.simplefilter("ignore")
            first = os.fork()
        if first == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            ours.close()
            run_first(start)
        theirs.close()
        return ours

    def _reap(self) -> None:
        """Collect every child that has ended; as pid 1 of the container this process inherits orphans too."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._children, 4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

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
    """Entry where the control socket is inherited: its descriptor is the first argument."""
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(control: socket.socket, host: int | None = None) -> None:
    """Entry: the first datagram holds the container's layout.

    `host` is a descriptor of the host's process (pidfd), where nothing else ends this one with it: the control socket
    stays open as long as a forked child of the host's has a copy.
    """
    control.set_inheritable(False)
    layout = json.loads(control.recv(_DATAGRAM))
    with contextlib.suppress(ValueError):
        # The place of this package is no place for the guest's imports.
        sys.path.remove(layout["guest_path"])
    sys.path.extend(layout["extra_path"])
    # A socket for each session that lives, however many; sessions have a bound of their own.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    layer = "folders"
    try:
        _check_folders(layout["folders"])
        layer = "seccomp"
        seccomp.install("outer")
        layer = "IPython"
        Supervisor(control, layout, host).run()
    except (OSError, RuntimeError, ImportError) as exc:
        control.send(json.dumps({"op": "failed", "layer": layer, "errno": None, "detail": f"{exc}"[:1000]}).encode())


def _check_folders(folders: list[tuple[str, int, int]]) -> None:
    """Refuse to run over a folder that is not the one which the host has checked."""
    for place, device, inode in folders:
        found = os.stat(place)
        if (found.st_dev, found.st_ino) != (device, inode):
            raise RuntimeError(f"{place} is not the folder that was checked: it was replaced meanwhile")
