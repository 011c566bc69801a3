"""A transfer of an attached client: by a connection of its own, so that it holds up nothing else that the client asks.

The client's greeting has its wish, and what is to be done (`carry`); the gateway welcomes it, and begins when the
client says so, so that what was not begun can be asked for again. Pieces then go both ways as between client and
kernel, and at last comes how it ended. Who leaves before that ends the transfer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from actbox import dialogue, refusals
from actbox.connecting import PIECES, TCP_SECONDS, Address, Pieces, beat, reach
from actbox.errors import ActboxError, ConnectionError, ExecutionLost, ProtocolError
from actbox.protocol import frames, messages
from actbox.protocol.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.execution import Transfer
    from actbox.lines import Ending, Line, Wish
    from actbox.link import Link

    Send = Callable[[dict[str, Any], bytes], Awaitable[None]]

# What may be asked for in this way.
_REQUESTS = frozenset({"download", "upload", "delete", "variables", "get", "set", "save", "restore"})
_IDLE_SECONDS = 90.0
_MAX_FRAMES = 50_000


class NotBegun(Exception):
    """There is no connection, and nothing was done."""


# -- the client's side -----------------------------------------------------------------------------------------------


async def carry(address: Address, wish: Wish, transfer: Transfer, timeout: float) -> Ending:
    """Have a transfer carried out in the session that the wish is for; how it ended.

    Raises:
        NotBegun: no connection could be had.
        ExecutionLost: it broke; what became of the transfer is unknown.
        ActboxError: what was answered is a refusal; see `Line.carry`.
    """
    pieces = Pieces()
    try:
        link = await reach(address, pieces)
    except OSError as exc:
        raise NotBegun(str(exc)) from exc
    beside: list[asyncio.Task[None]] = []
    try:
        await _greet(link, address, wish, {"carry": transfer.request, "timeout": timeout})
        beside = [
            asyncio.create_task(_send(transfer, link, pieces)),
            asyncio.create_task(beat(link, address.heartbeat)),
        ]
        return await _follow(link, transfer)
    except (OSError, frames.FrameError):
        raise ExecutionLost("the connection broke: it is unknown whether the transfer had its effects") from None
    finally:
        for task in beside:
            task.cancel()
        if beside:
            await asyncio.wait(beside)
        link.close()


async def _greet(link: Link, address: Address, wish: Wish, more: dict[str, Any]) -> None:
    try:
        await link.send({"type": "hello", "token": address.token, **dialogue.wish_fields(wish), **more})
        async with asyncio.timeout(TCP_SECONDS):
            frame = await link.receive()
    except (OSError, ProtocolError) as exc:
        raise NotBegun(str(exc)) from exc
    match frame.header if frame is not None else None:
        case None:
            raise NotBegun("the gateway closed the connection")
        case {"type": "welcome"}:
            await link.send({"type": "go"})
        case {"type": "refused"} as header:
            raise refusals.read_refusal(header)
        case _:
            raise ConnectionError("what answers at this port is no container's gateway")


async def _send(transfer: Transfer, link: Link, pieces: Pieces) -> None:
    async def send(header: dict[str, Any], payload: bytes) -> None:
        await pieces.send(link, Frame(header, payload))

    # A connection that has ended is noticed where it is read.
    with suppress(OSError):
        await transfer.send(send)
    if transfer.failure is not None:
        link.close()


async def _follow(link: Link, transfer: Transfer) -> Ending:
    answer: list[Frame] = []
    while (frame := await link.receive()) is not None:
        match frame.header:
            case {"type": "archive"}:
                await transfer.take(frame.payload)
                if transfer.failure is not None:
                    break
            case {"type": "left_out"}:
                # Of what is sent it is known here.
                transfer.left_out = messages.read_left_out(frame.header) or transfer.left_out
            case {"type": "refused"} as header:
                raise refusals.read_refusal(header)
            case header:
                answer.append(frame)
                if header.get("type") == "ending":
                    return dialogue.read_ending(answer)
                if len(answer) > _MAX_FRAMES:
                    raise ProtocolError("the gateway's answer is too long")
    raise ConnectionResetError("the connection ended")


# -- the gateway's side ----------------------------------------------------------------------------------------------


class Relay:
    """A transfer between the session and the client at the other end of a link; see `actbox.execution.Transfer`.

    State: `pieces`, what the client has sent and the kernel not yet taken; `begun`, set when the client says so.
    """

    def __init__(self, link: Link, request: dict[str, Any]) -> None:
        self.request = request
        self.failure: Exception | None = None
        self.left_out: tuple[str, ...] = ()
        self.pieces: asyncio.Queue[Frame] = asyncio.Queue(PIECES + 1)
        self.begun = asyncio.Event()
        self._link = link

    async def send(self, send: Send) -> None:
        """See `Transfer`."""
        while True:
            frame = await self.pieces.get()
            kind = frame.header["type"]
            await send({"type": kind}, frame.payload)
            await self._link.send({"type": "taken"})
            if kind == "archive_end":
                return

    async def take(self, data: bytes) -> None:
        """See `Transfer`."""
        try:
            await self._link.send({"type": "archive"}, data)
        except OSError as exc:
            self.failure = exc

    def release(self) -> None:
        """See `Transfer`: who waits for a piece is cancelled with the request."""


async def serve(link: Link, line: Line, hello: dict[str, Any]) -> None:
    """Carry out what a greeting asks for, and say how it ended; it is ended if the client leaves before."""
    relay, timeout = Relay(link, _read_request(hello)), _read_timeout(hello)
    await link.send({"type": "welcome"})
    reading = asyncio.create_task(_read(link, relay))
    carrying = asyncio.create_task(_carry(line, relay, timeout))
    tasks: set[asyncio.Task[Any]] = {reading, carrying}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if carrying.done():
            for frame in carrying.result():
                await link.send(frame.header, frame.payload)
            await link.close_gracefully()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _carry(line: Line, relay: Relay, timeout: float) -> list[Frame]:
    """How it ended, as frames."""
    await relay.begun.wait()
    try:
        ending = await line.carry(relay, timeout)
    except ActboxError as exc:
        return [refusals.refusal_frame(exc)]
    return [Frame({"type": "left_out", "left_out": list(relay.left_out)}, b""), *dialogue.ending_frames(ending)]


async def _read(link: Link, relay: Relay) -> None:
    """Take what the client sends until it leaves, or breaks the rules."""
    with suppress(TimeoutError, OSError, ProtocolError, frames.FrameError, asyncio.QueueFull):
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                frame = await link.receive()
            match frame.header if frame is not None else None:
                case {"type": "ping"}:
                    await link.send({"type": "pong"})
                case {"type": "go"}:
                    relay.begun.set()
                case {"type": "archive" | "archive_end"}:
                    assert frame is not None  # noqa: S101 - for the types
                    relay.pieces.put_nowait(frame)
                case _:
                    return


def _read_request(hello: dict[str, Any]) -> dict[str, Any]:
    match hello.get("carry"):
        case {"type": str(kind)} as request if kind in _REQUESTS:
            return dict(request)
        case _:
            raise ProtocolError("what is to be carried out is no transfer")


def _read_timeout(hello: dict[str, Any]) -> float:
    timeout = hello.get("timeout")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise ProtocolError("a transfer without a timeout")
    return float(timeout)
