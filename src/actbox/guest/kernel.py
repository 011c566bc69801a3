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
from typing import TYPE_CHECKING, Any

from ..protocol import frames
from . import shell as shells
from .interrupts import Interrupts
from .output import Channel
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


class Kernel:
    """One session's kernel.

    State: `_cell`, how many cells were begun; `_pid`, to tell this process from children that user code forks.
    """

    def __init__(
        self,
        stream: socket.socket,
        pipes: tuple[int, int],
        page: mmap.mmap,
        shell: shells.Shell,
        reloader: SkillReloader,
    ) -> None:
        self._stream = stream
        self._decoder = frames.Decoder()
        self._shell = shell
        self._reloader = reloader
        self._pid = os.getpid()
        self._limits: dict[str, Any] = {}
        self._interrupts = Interrupts(page)
        self._channel = Channel(stream, pipes, self._interrupts)
        self._transfers = Transfers(self._channel, self._interrupts, self._receive)

    def serve(self, start: dict[str, Any]) -> None:
        """Run cells until the host closes the stream; never returns to the caller's code in a forked child."""
        self._interrupts.install()
        self._channel.start()
        shells.connect(self._channel)
        _prepare_process(start)
        self._limits = start["limits"]
        self._shell.user_ns["_dh"][:] = [pathlib.Path(start["cwd"])]
        self._reloader.watch(start["skills"], self._interrupts)
        gc.enable()
        versions = {"python": sys.version.split()[0], "ipython": _ipython_version(), "landlock": start["landlock"]}
        self._channel.now({"type": "ready", **versions})
        while (frame := self._next_request()) is not None:
            kind = frame.header.get("type")
            # What else comes is the rest of an upload that ended before its time.
            if kind == "execute":
                self._answer(frame, self._run_cell)
            elif kind in REQUESTS:
                self._answer(frame, self._transfer)

    def _run_cell(self, frame: frames.Frame, _reply: dict[str, Any]) -> BaseException | None:
        self._reloader.before_cell()
        self._shell.interrupted = self._interrupts.was_delivered
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


def _left_over_loop() -> asyncio.AbstractEventLoop | None:
    """The loop of the shell's top-level `await`, if tasks are waiting in it."""
    from IPython.core import async_helpers

    loop = getattr(async_helpers, "_event_loop", None) or getattr(async_helpers, "_asyncio_event_loop", None)
    if loop is None or loop.is_closed() or not asyncio.all_tasks(loop):
        return None
    return loop


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
