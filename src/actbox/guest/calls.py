# IPython's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Functions of the host, called by the session's code: the kernel's side.

A call is a frame to the host and an answer that comes beside the running cell. Whoever calls waits: the main thread in
the middle of a cell, any other thread, or an asyncio task. So while a cell that has called runs, a thread reads the
stream; it ends with the cell, and between cells the kernel reads for itself, as it does where nothing is called.

Nothing here holds anybody back: what may be called, and with what, is decided by the host.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import inspect
import json
import os
import select
import signal
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

from . import mcptools, values

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ..protocol.frames import Decoder, Frame
    from .interrupts import Interrupts
    from .output import Channel
    from .shell import Shell

_RECEIVE = 256 << 10
_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)
# What cannot be raised out of a function or a future as what it is.
_NOT_RAISED = (StopIteration, StopAsyncIteration)


class CallRefused(RuntimeError):
    """The host did not call the function: it is unknown, was not approved, or cannot be called now."""


class CallBudgetExceeded(CallRefused):
    """The cell or the session has used up its calls."""


class HostError(Exception):
    """An exception of the host's function, of a class that is not Python's own; its name is that of the class."""


class _Words(str):
    """An annotation or a default, as the host wrote it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _Waiter:
    """One call: what came of it, once `done`; `wake` is called then."""

    def __init__(self) -> None:
        self.number = 0
        self.done = threading.Event()
        self.wake: Callable[[], None] = self.done.set
        self.value: Any = None
        self.error: BaseException | None = None

    def settle(self, value: Any, error: BaseException | None) -> None:
        """The one answer."""
        self.value, self.error = value, error
        self.wake()


class Calls:
    """Functions of the host in this session's namespace.

    State, all under `_lock`: `_running`, whether a cell runs that may call; `_waiting`, the calls without an answer by
    their numbers; `_queue`, those of them that are not sent yet, as no more than `_in_flight` may be; `_reader`, the
    thread that reads answers; `_used_up`, what the host has said of a budget that the cell has met. And of the main
    thread alone: `_known`, what the host has told of each function.
    """

    def __init__(
        self, stream: socket.socket, decoder: Decoder, channel: Channel, interrupts: Interrupts, shell: Shell
    ) -> None:
        self._stream = stream
        self._decoder = decoder
        self._channel = channel
        self._interrupts = interrupts
        self._shell = shell
        self._lock = threading.RLock()
        self._pid = 0
        self._running = False
        self._numbers = 0
        self._waiting: dict[int, _Waiter] = {}
        self._queue: OrderedDict[int, tuple[str, bytes]] = OrderedDict()
        self._in_flight = 1
        self._max_bytes = 0
        self._used_up = ""
        self._reader: threading.Thread | None = None
        self._wake = -1
        self._known: dict[str, Any] = {}

    def move(self, stream: socket.socket, decoder: Decoder) -> None:
        """This process has become another kernel, whose host is at the other end of this stream."""
        self._stream = stream
        self._decoder = decoder
        self._lock = threading.RLock()

    def install(self, frame: Frame) -> None:
        """Put the host's functions into the namespace; those that are there already stay as they are."""
        self._in_flight, self._max_bytes = int(frame.header["in_flight"]), int(frame.header["max_bytes"])
        registered = json.loads(frame.payload)
        mcptools.install(registered["modules"], self._make)
        for told in registered["functions"]:
            name = told["name"]
            if self._known.get(name) == told:
                continue
            self._known[name] = told
            # Hidden as IPython's own names are: no variable of the user's.
            self._shell.user_ns[name] = self._shell.user_ns_hidden[name] = self._make(told)

    def _make(self, told: dict[str, Any]) -> Any:
        name: str = told["name"]
        empty = inspect.Parameter.empty
        parameters = [
            inspect.Parameter(
                parameter,
                _KINDS[kind],
                default=empty if default is None else _Words(default),
                annotation=empty if annotation is None else _Words(annotation),
            )
            for parameter, kind, annotation, default in told["parameters"]
        ]
        returns = inspect.Signature.empty if told["returns"] is None else _Words(told["returns"])
        signature = inspect.Signature(parameters, return_annotation=returns)

        def function(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return self._call(name, signature, args, kwargs)

        async def aio(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return await self._call_aio(name, signature, args, kwargs)

        for made in (function, aio):
            made.__name__ = made.__qualname__ = told.get("as", name)
            made.__module__ = told.get("module", "host")
            made.__doc__ = told["doc"]
            cast("Any", made).__signature__ = signature
        cast("Any", function).aio = aio
        return function

    # -- calling -------------------------------------------------------------------------------------------------

    def _call(self, name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> Any:
        __tracebackhide__ = True
        waiter = _Waiter()
        self._begin_call(waiter, name, signature, args, kwargs)
        try:
            waiter.done.wait()
        finally:
            self._forget(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.value

    async def _call_aio(self, name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> Any:
        __tracebackhide__ = True
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()
        waiter = _Waiter()

        def wake() -> None:
            # A loop that is closed has nobody who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: answered.done() or answered.set_result(None))

        waiter.wake = wake
        self._begin_call(waiter, name, signature, args, kwargs)
        try:
            await answered
        finally:
            self._forget(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.value

    def _begin_call(self, waiter: _Waiter, name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        __tracebackhide__ = True
        if os.getpid() != self._pid:
            raise CallRefused(f"{name}() can be called by the session's own process alone, not by a child of it")
        signature.bind(*args, **kwargs)
        try:
            encoded = values.to_json([args, kwargs])
            payload = values.prefix(encoded.header) + encoded.data
        except values.Unsupported as exc:
            raise TypeError(f"{name}() takes JSON values and bytes, not {exc.kind}") from None
        if len(payload) > self._max_bytes:
            raise CallRefused(f"{name}() was given {len(payload)} bytes, more than the {self._max_bytes} allowed")
        with self._interrupts.held, self._lock:
            if not self._running:
                raise CallRefused(f"{name}() can be called while a cell runs, and none does")
            if self._used_up:
                raise CallBudgetExceeded(self._used_up)
            self._numbers += 1
            waiter.number = self._numbers
            if self._reader is None:
                self._start_reading()
            in_flight = len(self._waiting) - len(self._queue)
            self._waiting[waiter.number] = waiter
            if in_flight < self._in_flight:
                self._send(waiter.number, name, payload)
            else:
                self._queue[waiter.number] = name, payload

    def _send(self, number: int, name: str, payload: bytes) -> None:
        self._channel.at_once({"type": "call", "id": number, "name": name}, payload)

    def _forget(self, waiter: _Waiter) -> None:
        """Nobody waits for this answer any more. A call that is sent stays one at work, until the host answers."""
        with self._interrupts.held, self._lock:
            if self._queue.pop(waiter.number, None) is not None:
                del self._waiting[waiter.number]

    # -- for the kernel ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A cell runs from now on, in this process."""
        self._pid = os.getpid()
        self._used_up = ""
        self._running = True

    def end(self) -> None:
        """The cell has ended: who waits yet is told so, and the kernel reads for itself again."""
        if not self._running:
            return
        with self._lock:
            self._running = False
            reader, self._reader = self._reader, None
            left = list(self._waiting.values())
            self._waiting.clear()
            self._queue.clear()
        if reader is not None:
            os.eventfd_write(self._wake, 1)
            reader.join()
            os.close(self._wake)
        for waiter in left:
            waiter.settle(None, CallRefused("the cell that called has ended"))

    # -- the thread that reads -----------------------------------------------------------------------------------

    def _start_reading(self) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        reader = threading.Thread(target=self._read, name="actbox-calls", daemon=True)
        try:
            reader.start()
        except BaseException:
            os.close(self._wake)
            raise
        self._reader = reader

    def _read(self) -> None:
        # SIGINT is the main thread's, which may be waiting for what is read here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        poller = select.poll()
        poller.register(self._stream, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            while (frame := self._decoder.next_frame()) is not None:
                # Nothing else comes while a cell runs, but the rest of an upload that has ended before its time.
                if frame.header.get("type") == "call_result":
                    self._take(frame)
            if any(fd == self._wake for fd, _ in poller.poll()):
                return
            data = self._stream.recv(_RECEIVE)
            if not data:
                self._fail_all(ConnectionResetError("the host is gone"))
                return
            self._decoder.feed(data)

    def _take(self, frame: Frame) -> None:
        number = frame.header["id"]
        hopeless: list[_Waiter] = []
        with self._lock:
            if frame.header["status"] == "budget":
                self._used_up = frame.header["message"]
                # To send these too would be a flood, for which the host ends the session.
                hopeless = [self._waiting.pop(queued) for queued in self._queue]
                self._queue.clear()
            waiter = self._waiting.pop(number, None)
            while self._queue and len(self._waiting) - len(self._queue) < self._in_flight:
                queued, call = self._queue.popitem(last=False)
                self._send(queued, *call)
        for each in hopeless:
            each.settle(None, CallBudgetExceeded(self._used_up))
        if waiter is None:
            return
        try:
            waiter.settle(*_answer(frame))
        except Exception as exc:  # noqa: BLE001 - whatever it is, who waits must hear of it
            waiter.settle(None, exc)

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
            self._queue.clear()
        for waiter in left:
            waiter.settle(None, error)


def _answer(frame: Frame) -> tuple[Any, BaseException | None]:
    header = frame.header
    status = header["status"]
    if status == "ok":
        size = values.PREFIX.unpack_from(frame.payload)[0]
        start = values.PREFIX.size + size
        return values.from_json(json.loads(frame.payload[values.PREFIX.size : start]), frame.payload[start:]), None
    if status == "error":
        return None, _exception(header["name"], header["message"])
    kind = CallBudgetExceeded if status == "budget" else CallRefused
    return None, kind(header["message"])


def _exception(name: str, message: str) -> BaseException:
    """An exception like the host's: of Python's own class of that name, or of one made for it."""
    if name == "mcptools.ToolError":
        return mcptools.ToolError(message)
    kind: Any = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in _NOT_RAISED:
        with contextlib.suppress(Exception):
            return kind(message)
    return type(name, (HostError,), {})(message)
