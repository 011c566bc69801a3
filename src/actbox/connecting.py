"""How a client comes to a gateway by TCP, and how it knows that the connection still lives."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actbox.link import Link

if TYPE_CHECKING:
    from actbox.protocol.frames import Frame

TCP_SECONDS = 10.0
# Pieces of an upload that may be on their way to a gateway at one time. It says when the kernel has taken one, so that
# none of them stands in the way of an order to the gateway itself.
PIECES = 8
# A kernel that takes none for so long is given up by its gateway before.
_PIECE_SECONDS = 60.0
# A client that has heard nothing for this many heartbeats takes the link for dead.
_MISSED_BEATS = 3


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway is, and how to speak to it; `heartbeat` is in seconds."""

    host: str
    port: int
    token: str
    heartbeat: float

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Pieces:
    """Sends the pieces of an upload, no more of them at a time than the gateway takes. State: `_room`, how many may."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(PIECES)

    async def send(self, link: Link, frame: Frame) -> None:
        """Send a piece when there is room. Raises the built-in `ConnectionError`."""
        try:
            async with asyncio.timeout(_PIECE_SECONDS):
                await self._room.acquire()
        except TimeoutError:
            raise ConnectionResetError("the gateway does not take an upload") from None
        await link.send(frame.header, frame.payload)

    def note_sign(self, frame: Frame) -> bool:
        """Whether it is the gateway's sign that it lives, or that it has taken a piece; nobody else need see these."""
        kind = frame.header.get("type")
        if kind == "taken":
            self._room.release()
        return kind in ("taken", "pong")


async def reach(address: Address, pieces: Pieces) -> Link:
    """A connection to a gateway that nothing was said by. Raises `OSError`, of which `TimeoutError` is one."""
    async with asyncio.timeout(TCP_SECONDS):
        _, link = await asyncio.get_running_loop().create_connection(
            lambda: Link(swallow=pieces.note_sign), address.host, address.port
        )
    return link


async def beat(link: Link, interval: float) -> None:
    """Give a sign of life every so many seconds, and close the link when none comes back; ends with the link."""
    # What counts is pings without an answer, not time: a caller that blocks its loop must find its session again.
    unanswered, heard = 0, link.heard
    while not link.ended:
        await asyncio.sleep(interval)
        if link.heard > heard or link.paused:
            # While it is we who do not read, nothing can be heard, and nothing is to be feared.
            unanswered, heard = 0, link.heard
        elif unanswered >= _MISSED_BEATS:
            link.close()
            return
        with suppress(OSError):
            await link.send({"type": "ping"})
            unanswered += 1
