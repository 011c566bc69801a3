"""The host's side of one supervisor: starts it, and has it hand sockets to new sessions.

One `Supervision` per boundary, in the event loop of its container; `ask_session` may be called from any thread.
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
from actbox.protocol import frames
from actbox.protocol.messages import legible

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

    State: `_ready`, completed by the supervisor's first word; `_warmed`, set when all is loaded; `_gone`;
    `preload_errors`, modules that could not be loaded ahead.
    """

    def __init__(self, boundary: Boundary, on_gone: Callable[[], None]) -> None:
        self._boundary = boundary
        self._control = boundary.control
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._gone = False
        self._preload: frozenset[str] = frozenset()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._warmed = asyncio.Event()
        self.preload_errors: dict[str, str] = {}

    async def start(self, binds: list[dict[str, Any]], preload: tuple[str, ...], *, demanded: bool = True) -> None:
        """Tell the supervisor its layout, and wait until it can take sessions.

        Args:
            binds: the container's folders, each `{"target", "readonly", "per_key"}`.
            preload: modules to be imported ahead.
            demanded: whether one that is not installed is worth a word.

        Raises:
            NestingRefused: it cannot isolate sessions from each other.
            SandboxUnavailable: a layer failed inside.
            ConnectionError: it ended, or gave no sign within 60 s.
        """
        layout = self._boundary.layout
        self._preload = frozenset(preload)
        message = {
            "binds": binds,
            "preload": list(preload),
            "demanded": demanded,
            "nested": layout.nested,
            "guest_path": layout.guest_path,
            "extra_path": list(layout.extra_path),
            "seeds": layout.seeds,
            "folders": layout.folders,
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

    def ask_session(self, number: int, *sockets: socket.socket) -> None:
        """Ask for a session that holds these sockets: stream, watch, and one to ask for connections, if it may.

        Args:
            number: what the session is to be known by.
            sockets: the other ends of ours.

        Raises:
            ConnectionError: the supervisor is gone.
        """
        self._ask({"op": "session", "number": number}, sockets)

    def ask_fork(self, session: int, source: int, number: int, *sockets: socket.socket) -> None:
        """Pass a session the sockets for a kernel that one of its kernels, `source`, is about to fork as `number`.

        Raises:
            ConnectionError: the supervisor is gone.
        """
        self._ask({"op": "fork", "session": session, "source": source, "number": number}, sockets)

    def _ask(self, message: dict[str, Any], sockets: tuple[socket.socket, ...]) -> None:
        try:
            self._send(message, [sock.fileno() for sock in sockets])
        except OSError as exc:
            raise ConnectionError(f"the container does not answer: {exc}") from exc

    def answers(self) -> bool:
        """Whether the supervisor's end of its socket is open."""
        if self._gone:
            return False
        return not self._poll(0, 0)

    def _poll(self, events: int, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._control, events)
        return bool(poller.poll(1000 * seconds))

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
                    if not self._poll(select.POLLOUT, _SEND_SECONDS):
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
        try:
            message = frames.parse_header(data) if data else None
        except frames.FrameError as exc:
            logger.error("the supervisor broke the rules, and is taken for gone: %s", exc)  # noqa: TRY400 - no bug of ours
            message = None
        if message is None:
            self._loop.remove_reader(self._control)
            self._end()
            self._on_gone()
            return
        match message:
            case {"op": "preload-failed", "module": str(module), "error": str(error)}:
                # An exception's text is a library's own word.
                if module in self._preload:
                    self.preload_errors[module] = error
                    logger.warning("the module %s could not be loaded ahead: %s", module, legible(error))
            case {"op": "warm"}:
                self._warmed.set()
            case _:
                if not self._ready.done():
                    self._ready.set_result(message)

    def _end(self) -> None:
        self._gone = True
        if not self._ready.done():
            self._ready.set_result({})
        self._warmed.set()


def _remedy(layer: str) -> str:
    if layer == "IPython":
        return "The environment inside must have IPython: rebuild it with `actbox build`."
    return "Run `actbox doctor` for what this machine has."
