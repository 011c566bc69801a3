"""The host's end of a tunnel: a container's sockets over the one stream that the daemon attaches to it.

Where no socket can be shared (another machine's engine, Docker Desktop's virtual machine, gVisor) the container speaks
over its standard input and output. This end takes the sockets that a container hands to its supervisor, as the
supervisor would, and carries what is said on them; the guest's end (`guest/tunnel.py`) makes sockets again and hands
them to the real one. Neither looks into what it carries.

On the wire a block is a kind, a channel and a length, `>BII`, and so many bytes:

======== ========================================================================
CONTROL  a datagram of the control socket; channel 0
OPEN     a session with this channel; the first byte is "a" if it may ask for connections
DATA     bytes of the session's stream; a sender has at most `WINDOW` unread ones
READ     so many bytes were read (a number, `>I`): the sender may send as many more
CLOSE    the session's stream ended; of a connection, one direction of it
WATCH    a datagram of the session's watch socket
UNWATCH  the watch socket ended
ASK      a datagram of the session's asking socket: it wants a connection
GIVE     the answer: the number of a new channel that has a stream alone, or nothing
DROP     a connection is gone: nothing more will be said or taken by this end
======== ========================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import aiodocker
import aiohttp

if TYPE_CHECKING:
    from aiodocker.stream import Stream

    from actbox.engines.docker.boundary import Output

CONTROL, OPEN, DATA, READ, CLOSE, WATCH, UNWATCH, ASK, GIVE, DROP = range(1, 11)
HEADER = struct.Struct(">BII")
WINDOW = 1 << 20
_CHUNK = 64 << 10
_DATAGRAM = 64 << 10
_STDOUT = 1
# What writing to a stream raises that is gone, or that this side has closed.
GONE = (OSError, RuntimeError, AssertionError, aiohttp.ClientError, aiodocker.DockerError)


class _Broken(Exception):
    """The other end broke the rules of this wire, or is gone."""


class _Channel:
    """A session, or a connection that was given to one.

    State: its sockets; how many bytes may still be sent, and the news that it has become more; what waits to be
    written to the stream, with its size, an empty piece for the end; whether the stream takes nothing any more, and
    whether all that it says has been sent; the task that carries.
    """

    def __init__(
        self, stream: socket.socket, watch: socket.socket | None = None, asking: socket.socket | None = None
    ) -> None:
        self.stream = stream
        self.watch = watch
        self.asking = asking
        for sock in self.sockets:
            sock.setblocking(False)
        self.may_send = WINDOW
        self.room = asyncio.Event()
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.waiting = 0
        self.deaf = False
        self.sent_all = False
        self.task: asyncio.Task[None] | None = None

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """All that it has."""
        return tuple(sock for sock in (self.stream, self.watch, self.asking) if sock is not None)


class Tunnel:
    """See the module's text.

    State: `_channels`, the open ones by number; `_rest`, what was read of the stream but not yet taken; `_tasks`, which
    carry; `_closed`.
    """

    def __init__(self, stream: Stream, control: socket.socket, output: Output) -> None:
        self._stream = stream
        self._control = control
        self._control.setblocking(False)
        self._output = output
        self._rest = bytearray()
        self._channels: dict[int, _Channel] = {}
        self._numbers = 0
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def read_block(self, most: int) -> bytes | None:
        """A block of the time before `open`: its length, `>I`, and so many bytes. None if the stream ends."""
        head = await self._read(4)
        if head is None:
            return None
        (size,) = struct.unpack(">I", head)
        return await self._read(size) if size <= most else b""

    def open(self) -> None:
        """Carry from now on."""
        self._tasks |= {asyncio.create_task(self._inward()), asyncio.create_task(self._outward())}

    async def close(self) -> None:
        """End the stream, and every socket with it. Bounded in time; may be called again."""
        if not self._closed:
            await self._end()

    async def _end(self) -> None:
        self._closed = True
        own = asyncio.current_task()
        await _cancel({task for task in self._tasks if task is not own})
        # First the supervisor's socket: what a session's then tell is that the container is gone.
        self._control.close()
        channels = list(self._channels.values())
        await _cancel({channel.task for channel in channels if channel.task is not None})
        for channel in channels:
            # Of those whose task had no time to begin.
            for sock in channel.sockets:
                sock.close()
        with contextlib.suppress(*GONE):
            await self._stream.close()

    # -- from the container --------------------------------------------------------------------------------------

    async def _inward(self) -> None:
        try:
            while (head := await self._read(HEADER.size)) is not None:
                kind, number, size = HEADER.unpack(head)
                if size > WINDOW:
                    raise _Broken
                body = await self._read(size)
                if body is None:
                    break
                self._take(kind, number, body)
        except _Broken:
            pass
        finally:
            # The container is gone, or of no more use: whoever holds a socket of it learns that from the socket.
            if not self._closed:
                await self._end()

    def _take(self, kind: int, number: int, body: bytes) -> None:
        if kind == CONTROL:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self._control.send(body)
            return
        channel = self._channels.get(number)
        if channel is None:
            # Closed by us meanwhile.
            return
        if kind == DATA:
            channel.waiting += len(body)
            if channel.waiting > WINDOW:
                raise _Broken
            channel.inbox.put_nowait(body)
        elif kind == READ and len(body) == 4:  # noqa: PLR2004 - `>I`
            channel.may_send += struct.unpack(">I", body)[0]
            channel.room.set()
        elif kind == WATCH and channel.watch is not None:
            with contextlib.suppress(OSError):
                channel.watch.send(body)
        elif kind == ASK and channel.asking is not None:
            with contextlib.suppress(OSError):
                channel.asking.send(body)
        elif kind == CLOSE:
            channel.inbox.put_nowait(b"")
        elif kind == DROP and channel.watch is None:
            if channel.task is not None:
                channel.task.cancel()
        elif kind == UNWATCH and channel.watch is not None:
            with contextlib.suppress(OSError):
                channel.watch.shutdown(socket.SHUT_RDWR)
        else:
            raise _Broken

    async def _read(self, size: int) -> bytes | None:
        while len(self._rest) < size:
            try:
                message = await self._stream.read_out()
            except GONE:
                return None
            if message is None:
                return None
            if message.stream == _STDOUT:
                self._rest += message.data
            else:
                self._output.take(message.data)
        data = bytes(self._rest[:size])
        del self._rest[:size]
        return data

    # -- to the container ----------------------------------------------------------------------------------------

    async def _send(self, kind: int, number: int, body: bytes = b"") -> None:
        async with self._sending:
            # All who write to a full stream wait for one future of aiohttp's. Whoever is cancelled there cancels it,
            # and with it the next who writes, be it another session: so nobody waits there who may be.
            writing = asyncio.ensure_future(self._stream.write_in(HEADER.pack(kind, number, len(body)) + body))
            self._tasks.add(writing)
            writing.add_done_callback(self._tasks.discard)
            await asyncio.shield(writing)

    async def _outward(self) -> None:
        """What is said to the supervisor, and the sockets handed over with it."""
        try:
            while True:
                data, fds = await _receive(self._control)
                if not data:
                    return
                if not fds:
                    await self._send(CONTROL, 0, data)
                    continue
                stream, watch, *asking = (socket.socket(fileno=fd) for fd in fds)
                channel = _Channel(stream, watch, asking[0] if asking else None)
                await self._open(OPEN, channel, (b"a" if asking else b"-") + data)
        except GONE:
            return

    async def _open(self, kind: int, channel: _Channel, body: bytes, session: int | None = None) -> None:
        """Make a channel known at the other end; a connection is given to a `session`."""
        self._numbers += 1
        number = self._numbers
        self._channels[number] = channel
        if session is None:
            await self._send(kind, number, body)
        else:
            await self._send(kind, session, struct.pack(">I", number))
        channel.task = asyncio.create_task(self._carry(number, channel))

    async def _carry(self, number: int, channel: _Channel) -> None:
        """All that a channel needs, until the container has closed its sockets, or the host its own."""
        sending = asyncio.create_task(self._from_stream(number, channel))
        giving = asyncio.create_task(self._from_asking(number, channel))
        try:
            if channel.watch is None:
                # A connection has two directions, which end each for itself.
                await asyncio.gather(self._to_stream(number, channel), sending)
                with contextlib.suppress(*GONE):
                    await self._send(DROP, number)
            else:
                await asyncio.gather(self._to_stream(number, channel), self._from_watch(number, channel.watch))
        finally:
            self._channels.pop(number, None)
            await _cancel({sending, giving})
            for sock in channel.sockets:
                sock.close()

    async def _from_asking(self, number: int, channel: _Channel) -> None:
        """Connections that the host gives to a session that asked."""
        if channel.asking is None:
            return
        with contextlib.suppress(*GONE):
            while True:
                data, fds = await _receive(channel.asking)
                if not data:
                    return
                if not fds:
                    await self._send(GIVE, number)
                    continue
                await self._open(GIVE, _Channel(socket.socket(fileno=fds[0])), b"", session=number)

    async def _from_stream(self, number: int, channel: _Channel) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(*GONE):
            while True:
                while channel.may_send <= 0:
                    channel.room.clear()
                    await channel.room.wait()
                data = await loop.sock_recv(channel.stream, min(_CHUNK, channel.may_send))
                if not data:
                    channel.sent_all = True
                    await self._send(CLOSE, number)
                    return
                channel.may_send -= len(data)
                await self._send(DATA, number, data)

    async def _to_stream(self, number: int, channel: _Channel) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(*GONE):
            while data := await channel.inbox.get():
                if not channel.deaf:
                    try:
                        await loop.sock_sendall(channel.stream, data)
                    except OSError:
                        # It takes no more, which does not mean that all that it has said was sent.
                        channel.deaf = True
                if channel.deaf and (channel.sent_all or channel.watch is not None):
                    return
                channel.waiting -= len(data)
                await self._send(READ, number, struct.pack(">I", len(data)))
            channel.stream.shutdown(socket.SHUT_WR)

    async def _from_watch(self, number: int, watch: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(*GONE):
            while data := await loop.sock_recv(watch, _DATAGRAM):
                await self._send(WATCH, number, data)
            await self._send(UNWATCH, number)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """A datagram and the descriptors that came with it; nothing at the end."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(control, _DATAGRAM, 3)
        except BlockingIOError:
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(control, _complete, ready)
            try:
                await ready
            finally:
                loop.remove_reader(control)
        else:
            return data, fds


def _complete(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
