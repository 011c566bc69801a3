"""The host's side of one supervisor: asks for sessions, passes interrupts on, hears how sessions end.

One `Supervision` per boundary. It may be used from any thread: what arrives is handled in the event loop that started
it, and told to whoever asked in theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

from actbox.errors import ConnectionError, SandboxUnavailable
from actbox.sessions import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.engines.base import Boundary

logger = logging.getLogger(__name__)

_DATAGRAM = 64 << 10
_READY_SECONDS = 60.0
_SEND_SECONDS = 5.0


class NestingRefused(Exception):
    """This machine does not let a sandbox hold sandboxes: `layer` and `detail` say what was refused."""

    def __init__(self, layer: str, detail: str) -> None:
        self.layer = layer
        self.detail = detail
        super().__init__(f"{layer}: {detail}")


class Supervision:
    """See the module's text.

    State: `_listeners`, whom to tell of a session's end, by its number; `_last`, the last number given; `_ready`,
    completed by the supervisor's first word; `preload_errors`, modules that could not be loaded ahead.
    """

    def __init__(self, boundary: Boundary, on_gone: Callable[[], None]) -> None:
        self._boundary = boundary
        self._control = boundary.control
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Exit], None]] = {}
        self._last = 0
        self._gone = False
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._warmed = asyncio.Event()
        self.preload_errors: dict[str, str] = {}

    async def start(self, binds: list[dict[str, Any]], preload: tuple[str, ...]) -> None:
        """Tell the supervisor its layout, and wait until it can take sessions.

        Raises:
            NestingRefused: it cannot isolate sessions from each other.
            SandboxUnavailable: a layer failed inside.
            ConnectionError: it ended, or gave no sign within 60 s.
        """
        layout = self._boundary.layout
        message = {
            "binds": binds,
            "preload": list(preload),
            "nested": layout.nested,
            "guest_path": layout.guest_path,
            "extra_path": list(layout.extra_path),
            "seeds": layout.seeds,
        }
        with contextlib.suppress(OSError):
            self._send(message)
        self._loop.add_reader(self._control, self._read)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                answer = await self._ready
        except TimeoutError:
            raise ConnectionError(f"the supervisor gave no sign within {_READY_SECONDS:g} s") from None
        match answer:
            case {"op": "ready"}:
                return
            case {"op": "no-nesting", "layer": str(layer), "detail": str(detail)}:
                raise NestingRefused(layer, detail)
            case {"op": "failed", "layer": str(layer), "detail": str(detail)}:
                raise SandboxUnavailable(layer, detail, _remedy(layer))
            case _:
                raise ConnectionError("the supervisor ended before it was ready")

    @property
    def gone(self) -> bool:
        """Whether the supervisor, and with it every session, has ended."""
        return self._gone

    async def warmed(self) -> None:
        """Wait until every library of `preload` was imported, or the supervisor is gone."""
        await self._warmed.wait()

    def ask_session(self, stream: socket.socket, listener: Callable[[Exit], None]) -> int:
        """Ask for a session whose kernel holds `stream`; `listener` hears of its end, in the supervisor's loop.

        Raises:
            ConnectionError: the supervisor is gone.
        """
        with self._lock:
            if self._gone:
                raise ConnectionError("the container is gone")
            self._last += 1
            number = self._last
            self._listeners[number] = listener
        try:
            self._send({"op": "session", "session": number}, [stream.fileno()])
        except OSError as exc:
            with self._lock:
                self._listeners.pop(number, None)
            raise ConnectionError(f"the container does not answer: {exc}") from exc
        return number

    def interrupt(self, number: int, cell: int) -> None:
        """Have SIGINT sent to the session if this cell runs then."""
        with contextlib.suppress(OSError):
            self._send({"op": "interrupt", "session": number, "cell": cell})

    def kill(self, number: int) -> None:
        """Have the session killed; its listener hears of it."""
        with contextlib.suppress(OSError):
            self._send({"op": "kill", "session": number})

    def stop(self) -> None:
        """Forget the supervisor; call it before its boundary is closed, in its own loop."""
        if not self._gone:
            self._loop.remove_reader(self._control)
            self._end()

    def _send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        with self._lock:
            while True:
                try:
                    socket.send_fds(self._control, [data], fds or [])
                except BlockingIOError:
                    # The supervisor reads its requests between two forks or imports: moments, not seconds.
                    if not select.select([], [self._control], [], _SEND_SECONDS)[1]:
                        raise TimeoutError("the supervisor does not read") from None
                else:
                    return

    def _read(self) -> None:
        try:
            data = self._control.recv(_DATAGRAM)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._control)
            self._end()
            self._on_gone()
            return
        message: dict[str, Any] = json.loads(data)
        match message:
            case {"op": "exited", "session": int(number)}:
                with self._lock:
                    listener = self._listeners.pop(number, None)
                if listener is not None:
                    status, begun, killed = (message.get(field) for field in ("status", "begun", "killed"))
                    listener(Exit(status, begun or 0, killed=bool(killed)))
            case {"op": "preload-failed", "module": str(module), "error": str(error)}:
                self.preload_errors[module] = error
                logger.warning("the module %s could not be loaded ahead: %s", module, error)
            case {"op": "warm"}:
                self._warmed.set()
            case _:
                if not self._ready.done():
                    self._ready.set_result(message)

    def _end(self) -> None:
        with self._lock:
            self._gone = True
            listeners, self._listeners = list(self._listeners.values()), {}
        if not self._ready.done():
            self._ready.set_result({})
        self._warmed.set()
        for listener in listeners:
            listener(Exit(gone=True))


def _remedy(layer: str) -> str:
    if layer == "IPython":
        return "The environment inside must have IPython: rebuild it with `actbox build`."
    return "Run `actbox doctor` for what this machine has."
