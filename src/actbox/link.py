"""A stream of frames over a connected socket, read by one task at a time.

Reading stops while nobody takes the frames, so that a guest that talks without end waits for the host, and the host's
memory does not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from actbox.errors import ProtocolError
from actbox.protocol import frames

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_READ = 256 << 10
_HIGH_FRAMES = 256
_HIGH_BYTES = 2 << 20
_SEND_SECONDS = 30.0


class Link(asyncio.BufferedProtocol):
    """See the module's text.

    State: the decoder and what it holds; `_queue`, decoded frames not yet taken, with their size; `_waiter`, the one
    task that waits for a frame; `_ended`, whether no more will come; `heard`, when bytes last arrived, in the loop's
    time.

    Args:
        max_payload: bytes of a frame's payload at the most.
        swallow: frames for which it is true are not delivered.
    """

    def __init__(
        self,
        max_payload: int = frames.MAX_PAYLOAD,
        swallow: Callable[[frames.Frame], bool] | None = None,
    ) -> None:
        self._decoder = frames.Decoder(max_payload)
        self._buffer = bytearray(_READ)
        self._view = memoryview(self._buffer)
        self._queue: deque[frames.Frame] = deque()
        self._queued = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self._violation: ProtocolError | None = None
        self._swallow = swallow
        self.heard = 0.0

    @classmethod
    async def over(cls, sock: socket.socket, max_payload: int = frames.MAX_PAYLOAD) -> Link:
        """A link over a connected stream socket, which belongs to it from now on."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        try:
            _, link = await loop.connect_accepted_socket(lambda: cls(max_payload), sock)
        except BaseException:
            sock.close()
            raise
        return link

    @property
    def paused(self) -> bool:
        """Whether reading has stopped because nobody takes the frames."""
        return self._paused

    def allow(self, max_payload: int) -> None:
        """Take frames with payloads of up to so many bytes from now on."""
        self._decoder.max_payload = max_payload

    @property
    def ended(self) -> bool:
        """Whether the other side is gone; frames that had arrived may still be taken."""
        return self._ended

    async def receive(self) -> frames.Frame | None:
        """The next frame; None at the end of the stream.

        Raises:
            ProtocolError: what arrived is no frame.
        """
        while not self._queue:
            if self._violation is not None:
                raise self._violation
            if self._ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frame = self._queue.popleft()
        self._queued -= len(frame.payload)
        if self._paused and len(self._queue) < _HIGH_FRAMES // 2 and self._queued < _HIGH_BYTES // 2:
            self._take_frames()
        return frame

    async def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a frame; waits, within a bound, while the other side does not read.

        Raises:
            ConnectionError: (the built-in one) the other side is gone, or has not read for 30 s.
        """
        if self._transport is None or self._ended:
            raise ConnectionResetError("the stream has ended")
        self._transport.write(frames.encode(header, payload))
        if self._writable is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._writable), _SEND_SECONDS)
            except TimeoutError:
                self.close()
                raise ConnectionResetError("the other side does not read") from None

    def close(self) -> None:
        """End the stream now; what was not sent is dropped."""
        if self._transport is not None:
            self._transport.abort()

    async def close_gracefully(self) -> None:
        """End the stream once everything was sent, within a bound."""
        if self._writable is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._writable), _SEND_SECONDS)
        if self._transport is not None:
            self._transport.close()

    # -- called by the event loop --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what the loop makes for a stream socket
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = asyncio.get_running_loop().time()
        self._decoder.feed(self._view[:nbytes])
        self._take_frames()

    def _take_frames(self) -> None:
        """Decode as far as there is room for frames, and read on only then."""
        try:
            while len(self._queue) < _HIGH_FRAMES and self._queued < _HIGH_BYTES:
                frame = self._decoder.next_frame()
                if frame is None:
                    break
                if self._swallow is not None and self._swallow(frame):
                    continue
                self._queue.append(frame)
                self._queued += len(frame.payload)
            full = len(self._queue) >= _HIGH_FRAMES or self._queued >= _HIGH_BYTES
        except frames.FrameError as exc:
            self._violation = ProtocolError(str(exc))
            self.close()
            full = False
        if full != self._paused and self._transport is not None and not self._ended:
            self._paused = full
            if full:
                self._transport.pause_reading()
            elif not self._transport.is_closing():
                self._transport.resume_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - an end is an end
        self._ended = True
        # What is complete in the decoder was sent before the end, and counts.
        with contextlib.suppress(frames.FrameError):
            for frame in self._decoder.frames():
                self._queue.append(frame)
        self._wake()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
