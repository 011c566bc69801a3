"""Bytes between a guest and a host, in both directions at once, counted and bounded.

Nothing is kept: a side is read only when the other has taken what was read before, so that who is faster waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, NoReturn

from actbox.egress import heads
from actbox.egress.verdicts import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from actbox.network import Network

PIECE = 64 << 10
# Seconds, and never more than the idle bound: one side has said its last word, so the other's is near.
_HALF_CLOSED = 60.0
_MOST_ANSWER_HEAD = 64 << 10
_SWITCHING = 101


class Over(Exception):
    """A connection goes no further; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.message)


class Meter:
    """What a session has sent and received, all its connections together: `up` and `down`, in bytes.

    State: these two; `spent`, once a bound was met: why nothing more may be relayed.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.spent: Refusal | None = None
        self.up = 0
        self.down = 0

    def sends(self, count: int) -> None:
        """Count bytes that are about to go out. Raises `Over` if they may not."""
        if self.up + count > self._network.bytes_up:
            self._exhaust(Reason.BYTES_UP, self._network.bytes_up)
        self.up += count

    def receives(self, count: int) -> None:
        """Count bytes that came in and are about to be passed on. Raises `Over` if they may not."""
        if self.down + count > self._network.bytes_down:
            self._exhaust(Reason.BYTES_DOWN, self._network.bytes_down)
        self.down += count

    def _exhaust(self, reason: Reason, bound: int) -> NoReturn:
        self.spent = Refusal(503, reason, f"{reason} than {bound} bytes in all")
        raise Over(self.spent)


class Relay:
    """Between one guest and one host, both connected and non-blocking; closes neither.

    State: `up` and `down`, the bytes so far; `answering`, whether the guest was sent anything; `_deadline`, which every
    byte puts off.
    """

    def __init__(self, guest: socket.socket, host: socket.socket, meter: Meter, idle: float) -> None:
        self._guest = guest
        self._host = host
        self._meter = meter
        self._bound = idle
        self._deadline: asyncio.Timeout | None = None
        self.up = 0
        self.down = 0
        self.answering = False

    async def tunnel(self, first: bytes) -> None:
        """Relay until both sides have ended, or one is gone. `first` is what the guest has said already.

        Raises:
            Over: a bound was reached.
        """
        self.answering = True
        await self._both(self._upwards(first, None), self._downwards(), until_answered=False)

    async def exchange(self, first: bytes, body: int, method: bytes) -> None:
        """Send one request, its head and what has come of its body in `first`, and relay the answer until its end.

        `body` is how many bytes are still to come from the guest; of what it says behind them nothing is sent.

        Raises:
            Over: a bound was reached, or the host's answer is not HTTP.
        """
        await self._both(self._upwards(first, body), self._answer(method), until_answered=True)

    # -- the two directions, each a task ----------------------------------------------------------------------------

    async def _both(
        self, upwards: Coroutine[None, None, None], downwards: Coroutine[None, None, None], *, until_answered: bool
    ) -> None:
        tasks = (asyncio.create_task(upwards), asyncio.create_task(downwards))
        waiting = set(tasks)
        try:
            async with asyncio.timeout(self._bound) as self._deadline:
                while waiting and not (until_answered and tasks[1].done()):
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    self._bound = min(self._bound, _HALF_CLOSED)
                    self._moved()
        except TimeoutError:
            raise Over(Refusal(504, Reason.IDLE, f"{Reason.IDLE}, {self._bound:g} s")) from None
        except _Gone:
            return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _upwards(self, first: bytes, left: int | None) -> None:
        """To the host: `first`, then `left` bytes of the guest's, or all; then wait for the guest's end."""
        if not await self._send(first):
            return
        while left is None or left > 0:
            piece = await self._read(self._guest, PIECE if left is None else min(PIECE, left))
            if not piece and left is not None:
                raise _Gone  # in the middle of its request
            if not piece:
                with contextlib.suppress(OSError):
                    self._host.shutdown(socket.SHUT_WR)
                return
            if left is not None:
                left -= len(piece)
            if not await self._send(piece):
                return
        # Many hosts take the end of what they read for the end of all, so they are not told.
        while await self._read(self._guest, PIECE, moves=False):
            pass

    async def _downwards(self) -> None:
        """To the guest: all until the host's end."""
        while piece := await self._read(self._host, PIECE):
            await self._pass(piece)
        with contextlib.suppress(OSError):
            self._guest.shutdown(socket.SHUT_WR)

    async def _answer(self, method: bytes) -> None:
        """To the guest: the host's answer, marked as the last of this connection."""
        data = bytearray()
        answer = None
        while answer is None or not answer.final:
            end = heads.end_of_head(data)
            while end is None:
                seen = len(data)
                piece = await self._read(self._host, PIECE)
                data += piece
                if not piece or seen > _MOST_ANSWER_HEAD or not data.startswith(b"HTTP/1."[: len(data)]):
                    raise Over(_bad_answer())
                end = heads.end_of_head(data, seen)
            answer = heads.answer(bytes(data[:end]), method)
            # What is spoken after a switch of protocols is not HTTP; nobody could have asked for one.
            if answer is None or answer.status == _SWITCHING:
                raise Over(_bad_answer())
            await self._pass(answer.head)
            del data[:end]
        if answer.length is None:
            await self._pass(bytes(data))
            await self._downwards()
            return
        # Not all hosts close the connection because they were asked to.
        left = answer.length
        piece = bytes(data[:left])
        while left > 0 and (piece or (piece := await self._read(self._host, min(PIECE, left)))):
            left -= len(piece)
            await self._pass(piece)
            piece = b""

    # -- single steps -----------------------------------------------------------------------------------------------

    async def _read(self, source: socket.socket, count: int, *, moves: bool = True) -> bytes:
        # Where data is always there and always taken, no call would ever give way to the loop's other work.
        await asyncio.sleep(0)
        try:
            data = await asyncio.get_running_loop().sock_recv(source, count)
        except OSError:
            raise _Gone from None
        if moves:
            self._moved()
        return data

    async def _send(self, data: bytes) -> bool:
        """Send to the host; False if it takes no more, which does not mean that it has said all it has to say."""
        self._meter.sends(len(data))
        self.up += len(data)
        try:
            await asyncio.get_running_loop().sock_sendall(self._host, data)
        except OSError:
            return False
        self._moved()
        return True

    async def _pass(self, data: bytes) -> None:
        """Send to the guest."""
        self._meter.receives(len(data))
        self.down += len(data)
        self.answering = True
        try:
            await asyncio.get_running_loop().sock_sendall(self._guest, data)
        except OSError:
            raise _Gone from None
        self._moved()

    def _moved(self) -> None:
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._bound)


class _Gone(Exception):
    """One of the two sides is no longer there."""


def _bad_answer() -> Refusal:
    return Refusal(502, Reason.BAD_ANSWER, f"{Reason.BAD_ANSWER}")
