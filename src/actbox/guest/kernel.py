# IPython's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The kernel: runs a session's cells and transfers of files, one after the other, until its stream ends.

Everything here runs after the boundary stands, with no rights left, beside code that nobody read. What the host learns
from it is the guest's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import pathlib
import random
import select
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from ..protocol import frames
from . import branching, folders, interrupts, saving, values, variables
from . import shell as shells
from .calls import Calls
from .interrupts import Interrupts
from .output import THREAD, Channel
from .places import Refused
from .refusals import refused_by
from .transfer import REQUESTS, Transfers

if TYPE_CHECKING:
    import mmap
    import socket
    from collections.abc import Callable

    from .reload import SkillReloader

_RECEIVE = 256 << 10
_libc = ctypes.CDLL(None, use_errno=True)


class _Born(BaseException):
    """This process is a copy that has become a kernel of its own."""


class Kernel:
    """One session's kernel, or a copy of it that was forked between two cells.

    State: `_pid`, to tell this process from children that user code forks; `_ready`, what it says when it is.
    """

    def __init__(
        self,
        stream: socket.socket,
        kin: socket.socket,
        pipes: tuple[int, int],
        memory: mmap.mmap,
        shell: shells.Shell,
        reloader: SkillReloader,
    ) -> None:
        self._stream = stream
        self._kin = kin
        self._memory = memory
        self._decoder = frames.Decoder()
        self._shell = shell
        self._reloader = reloader
        self._pid = os.getpid()
        self._limits: dict[str, Any] = {}
        self._can_fork = False
        self._folder: folders.PrivateFolder
        self._ready: dict[str, Any] = {}
        self._interrupts = Interrupts(interrupts.slot(memory, 0))
        self._channel = Channel(stream, pipes, self._interrupts)
        os.register_at_fork(after_in_child=self._leave_kin)
        self._transfers = Transfers(self._channel, self._interrupts, self._receive)
        served = self._channel, self._interrupts, self._receive, shell
        self._variables, self._saving = variables.Variables(*served), saving.Saving(*served)
        self._calls = Calls(stream, self._decoder, self._channel, self._interrupts, shell)

    def serve(self, start: dict[str, Any]) -> None:
        """Run cells until the host closes the stream; never returns to the caller's code in a forked child."""
        self._interrupts.install()
        self._interrupts.watch_losses()
        self._channel.start()
        shells.connect(self._channel)
        _prepare_process(start)
        self._limits = start["limits"]
        self._can_fork = bool(start["forks"])
        self._shell.user_ns["_dh"][:] = [pathlib.Path(start["cwd"])]
        self._reloader.watch(start["skills"], self._interrupts)
        self._folder = folders.PrivateFolder(start["cwd"], self._reloader)
        gc.enable()
        versions = {"python": sys.version.split()[0], "ipython": _ipython_version(), "landlock": start["landlock"]}
        self._ready = {"type": "ready", **versions}
        self._channel.now(self._ready)
        while (frame := self._next_request()) is not None:
            # The copy goes on here too, with the requests of its own host.
            with contextlib.suppress(_Born):
                self._serve_request(frame)

    def _serve_request(self, frame: frames.Frame) -> None:
        kind = frame.header.get("type")
        # What else comes is the rest of an upload that ended before its time.
        if kind == "execute":
            self._answer(frame, self._run_cell)
        elif kind == "functions":
            # Where a cell has broken Python itself the functions are missing, and calling one says so.
            with contextlib.suppress(Exception):
                self._calls.install(frame)
        elif kind in REQUESTS:
            self._answer(frame, self._transfer)
        elif kind in variables.REQUESTS or kind in saving.REQUESTS:
            self._answer(frame, self._exchange)
        elif kind in folders.REQUESTS:
            self._answer(frame, self._change_folder)
        elif kind == "fork":
            self._answer(frame, self._fork)

    def _run_cell(self, frame: frames.Frame, _reply: dict[str, Any]) -> BaseException | None:
        self._reloader.before_cell()
        self._shell.interrupted = self._interrupts.was_delivered
        self._calls.begin()
        result = self._shell.run_cell(frame.payload.decode("utf-8", "replace"), store_history=True)
        return result.error_before_exec or result.error_in_exec

    def _transfer(self, frame: frames.Frame, reply: dict[str, Any]) -> BaseException | None:
        try:
            left_out = self._transfers.serve(frame.header)
        except Refused as exc:
            shells.send_error("TransferRefused", exc.reason, "")
            return exc
        except Exception as exc:  # noqa: BLE001 - user code has changed Python itself; the kernel goes on
            return exc
        if left_out:
            reply["left_out"] = left_out
        return None

    def _change_folder(self, frame: frames.Frame, _reply: dict[str, Any]) -> BaseException | None:
        try:
            self._folder.serve(frame.header)
        except Refused as exc:
            shells.send_error("FolderRefused", exc.reason, "")
            return exc
        except Exception as exc:  # noqa: BLE001 - see _transfer
            return exc
        return None

    def _fork(self, frame: frames.Frame, _reply: dict[str, Any]) -> BaseException | None:
        """Become two. In the copy it raises `_Born`."""
        try:
            if not self._can_fork:
                raise Refused("a sandbox of this kind (gVisor) cannot tell whose child a copy is")
            number = int(frame.header["slot"])
            sockets = branching.take_sockets(self._kin, number)
            try:
                if frame.header.get("force") is not True:
                    branching.check_forkable({THREAD}, _loop())
                with self._interrupts.held:
                    born = branching.fork()
                if born:
                    self._begin_again(sockets, number)
            finally:
                sockets.close()
        except Refused as exc:
            shells.send_error("ForkRefused", exc.reason, "")
            return exc
        except Exception as exc:  # noqa: BLE001 - see _transfer
            return exc
        return None

    def _begin_again(self, sockets: branching.Sockets, number: int) -> NoReturn:
        """Be the kernel that these sockets are for. Whatever fails, no second copy of the first goes on."""
        try:
            branching.start_over()
            pipes = _new_outputs()
            self._stream, self._kin = sockets.stream.dup(), sockets.kin.dup()
            self._decoder = frames.Decoder()
            self._interrupts.move(interrupts.slot(self._memory, number))
            self._channel.move(self._stream, pipes)
            self._calls.move(self._stream, self._decoder)
            self._pid = os.getpid()
            self._kin.send(b"here")
            self._channel.now(self._ready)
        except BaseException:  # noqa: BLE001 - the last place where it can be told
            traceback.print_exc()
            os._exit(71)
        raise _Born

    def _leave_kin(self) -> None:
        """A child that user code forks has nothing to do with the watcher."""
        self._kin.close()

    def _exchange(self, frame: frames.Frame, _reply: dict[str, Any]) -> BaseException | None:
        try:
            if frame.header["type"] in saving.REQUESTS:
                self._saving.serve(frame.header, self._folder.root)
            else:
                self._variables.serve(frame.header)
        except Refused as exc:
            shells.send_error(_refusal(exc), exc.reason, "")
            return exc
        except Exception as exc:  # noqa: BLE001 - what a library says of a value, or user code that it has called
            return exc
        return None

    def _answer(
        self, request: frames.Frame, work: Callable[[frames.Frame, dict[str, Any]], BaseException | None]
    ) -> None:
        cell = int(request.header["id"])
        self._interrupts.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._channel.begin()
        shells.outputs.told_error = False
        reply: dict[str, Any] = {"type": "execute_reply", "id": cell, "status": "ok"}
        try:
            self._interrupts.begin(cell)
            error = work(request, reply)
        except KeyboardInterrupt as exc:
            # It came outside the user's code, where IPython does not catch it.
            error = exc
        if os.getpid() != self._pid:
            # A child that the cell forked has come to the end of the cell: it is no kernel.
            os._exit(0)
        self._interrupts.end()
        self._calls.end()
        if self._interrupts.delivered and isinstance(error, KeyboardInterrupt):
            reply["status"] = "interrupted"
        elif error is not None and not shells.ended_well(error):
            reply["status"] = "error"
            limit = refused_by(error, self._limits)
            if limit is not None:
                reply["limit"] = limit
        if reply["status"] != "ok" and not shells.outputs.told_error and error is not None:
            shells.send_error(*shells.in_short(error))
        reply["execution_count"] = self._shell.execution_count - 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        self._reloader.after_cell()
        self._channel.end(reply)

    def _next_request(self) -> frames.Frame | None:
        while (frame := self._decoder.next_frame()) is None:
            self._run_tasks_until_readable()
            try:
                data = self._stream.recv(_RECEIVE)
            except OSError:
                return None
            if not data:
                return None
            self._decoder.feed(data)
        return frame

    def _receive(self) -> frames.Frame:
        """The host's next frame, in the middle of a request: an interrupt comes while it waits, and tears nothing.

        Raises:
            EOFError: the host is gone.
        """
        poller = select.poll()
        poller.register(self._stream, select.POLLIN)
        while True:
            with self._interrupts.held:
                frame = self._decoder.next_frame()
            if frame is not None:
                return frame
            poller.poll()
            with self._interrupts.held:
                data = self._stream.recv(_RECEIVE)
                if not data:
                    raise EOFError("the host is gone")
                self._decoder.feed(data)

    def _run_tasks_until_readable(self) -> None:
        """Let asyncio tasks that a cell left behind go on between the cells, as in Jupyter."""
        loop = _left_over_loop()
        if loop is None:
            return
        loop.add_reader(self._stream, loop.stop)
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # A task's own, and no cell's: asyncio would end the program.
            traceback.print_exc()
        finally:
            loop.remove_reader(self._stream)


def _refusal(exc: Refused) -> str:
    """What the host calls it."""
    if isinstance(exc, saving.StateRefused):
        return "StateRefused"
    if isinstance(exc, variables.Missing):
        return "VariableMissing"
    return "VariableUnsupported" if isinstance(exc, values.Unsupported) else "VariableRefused"


def _left_over_loop() -> asyncio.AbstractEventLoop | None:
    """The loop of the shell's top-level `await`, if tasks are waiting in it."""
    loop = _loop()
    return loop if loop is not None and asyncio.all_tasks(loop) else None


def _loop() -> asyncio.AbstractEventLoop | None:
    from IPython.core import async_helpers

    loop = getattr(async_helpers, "_event_loop", None) or getattr(async_helpers, "_asyncio_event_loop", None)
    return None if loop is None or loop.is_closed() else loop


def _new_outputs() -> tuple[int, int]:
    """Pipes behind file descriptors 1 and 2; where they can be read."""
    readers: list[int] = []
    for number in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(writer)
        readers.append(reader)
    return readers[0], readers[1]


def _prepare_process(start: dict[str, Any]) -> None:
    os.environ.update(start["env"])
    if start["packages"] is not None:
        # Where pip puts what is installed while the session runs: its own scratch space, gone with it.
        os.makedirs(start["packages"], exist_ok=True)
        os.environ["PIP_TARGET"] = start["packages"]
        os.environ["PATH"] += f"{os.pathsep}{start['packages']}/bin"
        sys.path.append(start["packages"])
    if "TZ" in start["env"]:
        import time

        time.tzset()
    os.chdir(start["cwd"])
    os.environ["PWD"] = start["cwd"]
    sys.path[:0] = [*start["skills"], *([start["cwd"]] if start["cwd"] not in start["skills"] else [])]
    sys.argv = [""]
    # A skill's bytecode is not worth a folder of files among the user's own, and one that is stale for a second
    # would hide an edit.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # Sessions are forks of one process: what was random there must not be the same in all of them.
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _ipython_version() -> str:
    import IPython

    return IPython.__version__


def close_other_files(keep: set[int]) -> None:
    """Close every file descriptor but these, whatever this process inherited."""
    low = 0
    for fd in [*sorted(keep), 1 << 31]:
        if low < fd and _libc.close_range(ctypes.c_uint(low), ctypes.c_uint(fd - 1), 0) != 0:
            os.closerange(low, min(fd, 1 << 16))
        low = fd + 1
