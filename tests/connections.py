"""What stands between a test and a container's port: a relay that cuts connections, and one that speaks in frames."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self

from actbox.protocol import frames

if TYPE_CHECKING:
    from actbox import ExecutionContainer

SECONDS = 15.0
# Another spelling of 127.0.0.1: a client that uses it does not find the container's door in this process.
BY_THE_PORT = "127.1"


class Relay:
    """A port in front of a container's that cuts connections.

    `toward` a side ("gateway" or "client") only `left` more bytes are let through; then both sides are cut, once, or
    with `every` the same again for each connection. While there were fewer than `mute_until` connections nothing gets
    through, and nobody is told. State: `passed`, how many bytes went each way.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0
        self.passed = {"gateway": 0, "client": 0}
        self.connections = 0
        self.toward = ""
        self.left = 0
        self.every: int | None = None
        self.mute_until = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._pumps):
            task.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def cut(self, toward: str, after: int) -> None:
        self.toward, self.left = toward, after

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.every is not None:
            self.left = self.every
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        both = (writer, back)
        for source, sink, side in ((reader, back, "gateway"), (there, writer, "client")):
            task = asyncio.create_task(self._pump(source, sink, side, both))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        side: str,
        both: tuple[asyncio.StreamWriter, ...],
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    if self.connections < self.mute_until:
                        continue
                    is_cut = side == self.toward and len(data) >= self.left
                    if side == self.toward:
                        data = data[: self.left]
                        self.left -= len(data)
                    self.passed[side] += len(data)
                    sink.write(data)
                    await sink.drain()
                    if is_cut:
                        self.toward = "" if self.every is None else self.toward
                        break
        finally:
            for writer in both:
                writer.close()


class Raw:
    """A connection to the port that speaks in bytes and frames."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._decoder = frames.Decoder()

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self.writer.write(frames.encode(header, payload))

    async def receive(self) -> dict[str, Any] | None:
        """The next frame's header; None at the end."""
        async with asyncio.timeout(SECONDS):
            while (frame := self._decoder.next_frame()) is None:
                try:
                    data = await self.reader.read(1 << 16)
                except OSError:
                    return None
                if not data:
                    return None
                self._decoder.feed(data)
        return frame.header

    async def is_closed_within(self, seconds: float) -> bool:
        """Whether the other side closes the connection, without a word."""
        try:
            async with asyncio.timeout(seconds):
                return await self.reader.read(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


class RawAttached(Raw):
    """One that greets as a client of a named session does."""

    def __init__(self, container: ExecutionContainer, **wish: Any) -> None:
        super().__init__(container.port)
        self.hello: dict[str, Any] = {
            "type": "hello",
            "token": container.token,
            "attach": "raw",
            "client": "c",
            "key": None,
            "ttl": 60,
            "drive": True,
            "take_over": True,
            "incarnation": None,
            "recover": False,
            **wish,
        }

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.send(self.hello)
        return self
