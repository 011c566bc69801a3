"""What is moved between a session and this process's memory, or a file of its own: the frame of it.

As a transfer of files it is an execution among the cells, and ends like one. What comes begins with a header, whose
length comes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from actbox.errors import ActboxError, ExecutionError, ProtocolError
from actbox.execution import check_timeout
from actbox.protocol.messages import legible
from actbox.values import MAX_HEADER, PREFIX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.execution import Transfer

    Send = Callable[[dict[str, Any], bytes], Awaitable[None]]

MAX_REASON = 1000
PIECE = 256 << 10


class Exchanges(ABC):
    """What a client offers to those of its methods that exchange values with a session."""

    @abstractmethod
    def check_connected(self) -> None:
        """Raises `StateError` unless requests can be submitted."""

    @abstractmethod
    async def carry_out(self, transfer: Transfer, timeout: float) -> None:
        """Have a request carried out behind the cells and transfers submitted before; raises as `Execution.result`."""

    async def exchange(self, exchange: Exchange, timeout: float) -> None:
        """Have a request carried out. Raises what an execution does, or the request's own refusal."""
        check_timeout(timeout)
        try:
            await self.carry_out(exchange, timeout)
        except ActboxError as exc:
            if exchange.failure is not None:
                raise exchange.failure from exc
            if type(exc) is ExecutionError:
                raise exchange.refusal(exc.name or "", legible(exc.value or str(exc))[:MAX_REASON]) from None
            raise
        if exchange.failure is not None:
            raise exchange.failure


class Exchange(ABC):
    """One request; see `actbox.execution.Transfer`.

    State: `failure`, what went wrong on this side; `released`, whether it is being ended; `_head`, the header that
    comes, with its length before it, as far as it has come.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.failure: Exception | None = None
        self.left_out: tuple[str, ...] = ()
        self.released = False
        self._head = bytearray()

    @abstractmethod
    def refusal(self, name: str, reason: str) -> ActboxError:
        """What the guest's exception is here."""

    @property
    def head(self) -> bytes:
        """The header, once all has come. Raises `ProtocolError` if it has not."""
        if not self._room_in_head() and len(self._head) > PREFIX.size:
            return bytes(self._head[PREFIX.size :])
        raise ProtocolError("the kernel sent less than it was asked for")

    async def send(self, send: Send) -> None:  # noqa: B027 - most send nothing
        """See `Transfer`."""

    async def take(self, data: bytes) -> None:
        """See `Transfer`."""
        start = 0
        while start < len(data) and (room := self._room_in_head()):
            self._head += data[start : start + room]
            start += room
        if self.failure is None and not self.released and start < len(data):
            await self.take_body(data[start:])

    def _room_in_head(self) -> int:
        if len(self._head) < PREFIX.size:
            return PREFIX.size - len(self._head)
        size = PREFIX.unpack_from(self._head)[0]
        if size > MAX_HEADER:
            raise ProtocolError("the kernel announced an endless header")
        return PREFIX.size + size - len(self._head)

    async def take_body(self, data: bytes) -> None:  # noqa: ARG002 - nothing should come
        """What comes behind the header."""
        raise ProtocolError("the kernel sent more than it was asked for")

    def release(self) -> None:
        """See `Transfer`."""
        self.released = True


async def send_pieces(exchange: Exchange, send: Send, data: bytes | memoryview) -> None:
    """Send all of a value, unless the request is ended before."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        if exchange.released:
            return
        await send({"type": "archive"}, bytes(view[start : start + PIECE]))
    await send({"type": "archive_end"}, b"")
