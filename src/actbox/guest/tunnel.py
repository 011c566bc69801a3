"""The guest's end of a tunnel: the first process of a container that has only its standard input and output.

It forks the supervisor, and carries between the stream and the supervisor's sockets what the host's end carries to and
from a container's (`engines/docker/tunnel.py` tells how it looks on the wire). It opens for every session the two
sockets that the supervisor hands on; it looks into nothing. When the stream ends so does this process, and with it the
container.

State: the channels by number; what was read of the stream but not yet taken.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from typing import NoReturn

from . import isolation, supervisor

CONTROL, OPEN, DATA, READ, CLOSE, WATCH, UNWATCH, ASK, GIVE, DROP = range(1, 11)
HEADER = struct.Struct(">BII")
WINDOW = 1 << 20
_CHUNK = 64 << 10


class _Channel:
    """A session, or a connection that was given to one.

    Our ends of its sockets, None once closed or where there is none; what may still be sent; what waits to be written,
    and whether that is all. Of a connection also whether the session has said all, and whether the host is gone.
    """

    def __init__(
        self,
        number: int,
        stream: socket.socket,
        watch: socket.socket | None = None,
        asking: socket.socket | None = None,
    ) -> None:
        self.number = number
        self.stream: socket.socket | None = stream
        self.watch = watch
        self.asking = asking
        self.may_send = WINDOW
        self.inbox = bytearray()
        self.closing = False
        self.is_connection = watch is None
        self.read_all = False
        self.dropped = False


class Tunnel:
    """See the module's text."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        control.setblocking(False)
        self._rest = bytearray()
        self._channels: dict[int, _Channel] = {}
        self._children, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self) -> None:
        """Carry until the stream or the supervisor ends."""
        while True:
            poller = select.poll()
            for fd in (0, self._control.fileno(), self._children):
                poller.register(fd, select.POLLIN)
            owners: dict[int, _Channel] = {}
            for channel in self._channels.values():
                self._register(poller, owners, channel)
            for fd, event in poller.poll():
                if fd == 0:
                    if not self._from_host():
                        return
                elif fd == self._control.fileno():
                    if not self._from_supervisor():
                        return
                elif fd == self._children:
                    self._reap()
                elif fd in owners:
                    self._serve(owners[fd], fd, event)
            for channel in list(self._channels.values()):
                if channel.stream is None and channel.watch is None:
                    if channel.asking is not None:
                        channel.asking.close()
                    del self._channels[channel.number]

    def _register(self, poller: select.poll, owners: dict[int, _Channel], channel: _Channel) -> None:
        if channel.stream is not None:
            reads = channel.may_send > 0 and not (channel.read_all or channel.dropped)
            wanted = (select.POLLIN if reads else 0) | (select.POLLOUT if channel.inbox else 0)
            # Without a wish it would still be told that the other end hung up, again and again: what has said all may
            # be told, once.
            if wanted or channel.read_all:
                poller.register(channel.stream, wanted)
                owners[channel.stream.fileno()] = channel
        if channel.watch is not None:
            poller.register(channel.watch, select.POLLIN)
            owners[channel.watch.fileno()] = channel
        if channel.asking is not None:
            poller.register(channel.asking, select.POLLIN)
            owners[channel.asking.fileno()] = channel

    # -- from the host -------------------------------------------------------------------------------------------

    def _from_host(self) -> bool:
        data = os.read(0, WINDOW)
        if not data:
            return False
        self._rest += data
        start = 0
        while len(self._rest) - start >= HEADER.size:
            kind, number, size = HEADER.unpack_from(self._rest, start)
            end = start + HEADER.size + size
            if len(self._rest) < end:
                break
            self._take(kind, number, bytes(self._rest[start + HEADER.size : end]))
            start = end
        del self._rest[:start]
        return True

    def _take(self, kind: int, number: int, body: bytes) -> None:
        if kind == CONTROL:
            self._control.send(body)
            return
        if kind == OPEN:
            self._open(number, body)
            return
        channel = self._channels.get(number)
        if channel is None:
            return
        if kind == DATA and channel.stream is not None:
            channel.inbox += body
            self._write(channel)
        elif kind == READ:
            channel.may_send += struct.unpack(">I", body)[0]
        elif kind in (CLOSE, DROP):
            channel.closing = True
            channel.dropped = kind == DROP
            self._write(channel)
        elif kind == WATCH and channel.watch is not None:
            with contextlib.suppress(OSError):
                channel.watch.send(body)
        elif kind == UNWATCH and channel.watch is not None:
            # The watcher ends its session when this socket ends.
            channel.watch.close()
            channel.watch = None
        elif kind == GIVE and channel.asking is not None:
            self._give(channel.asking, body)

    def _open(self, number: int, body: bytes) -> None:
        stream, their_stream = socket.socketpair()
        watch, their_watch = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asking, their_asking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The first byte tells whether the session may ask for connections.
        theirs = [their_stream, their_watch, *([their_asking] if body[:1] == b"a" else [])]
        with their_stream, their_watch, their_asking:
            self._control.setblocking(True)
            try:
                socket.send_fds(self._control, [body[1:]], [sock.fileno() for sock in theirs])
            finally:
                self._control.setblocking(False)
        for sock in (stream, watch, asking):
            sock.setblocking(False)
        if their_asking not in theirs:
            asking.close()
        self._channels[number] = _Channel(number, stream, watch, asking if their_asking in theirs else None)

    def _give(self, asking: socket.socket, body: bytes) -> None:
        """A connection for the session, with the number in the body; without one, that there is none."""
        if not body:
            with contextlib.suppress(OSError):
                asking.send(b"n")
            return
        (number,) = struct.unpack(">I", body)
        try:
            stream, theirs = socket.socketpair()
        except OSError:
            _say(DROP, number)
            self._give(asking, b"")
            return
        stream.setblocking(False)
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(asking, [b"c"], [theirs.fileno()])
        self._channels[number] = _Channel(number, stream)

    def _write(self, channel: _Channel) -> None:
        """Write to a session what it will take now."""
        if channel.stream is None:
            return
        try:
            while channel.inbox:
                sent = channel.stream.send(channel.inbox[:_CHUNK])
                del channel.inbox[:sent]
                _say(READ, channel.number, struct.pack(">I", sent))
            if channel.dropped:
                channel.stream.close()
                channel.stream = None
            elif channel.closing:
                channel.stream.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            channel.inbox.clear()
            if channel.is_connection:
                self._drop(channel)

    def _drop(self, channel: _Channel) -> None:
        """The session has hung up a connection: the host need not wait for what it would say, or take."""
        if channel.stream is not None:
            channel.stream.close()
            channel.stream = None
            _say(DROP, channel.number)

    # -- to the host ---------------------------------------------------------------------------------------------

    def _from_supervisor(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            data = self._control.recv(_CHUNK)
            if not data:
                return False
            _say(CONTROL, 0, data)
        return True

    def _serve(self, channel: _Channel, fd: int, event: int) -> None:
        if channel.stream is not None and fd == channel.stream.fileno():
            stream = channel.stream
            if event & select.POLLOUT:
                self._write(channel)
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and stream.fileno() >= 0:
                self._from_stream(channel, stream)
        elif channel.watch is not None and fd == channel.watch.fileno():
            self._from_watch(channel, channel.watch)
        elif channel.asking is not None and fd == channel.asking.fileno():
            self._from_asking(channel, channel.asking)

    def _from_stream(self, channel: _Channel, stream: socket.socket) -> None:
        if channel.read_all:
            # Both directions have ended, or the session has hung up.
            self._drop(channel)
            return
        data = b""
        try:
            data = stream.recv(min(_CHUNK, max(channel.may_send, 1)))
        except BlockingIOError:
            return
        except OSError:
            pass
        if data:
            channel.may_send -= len(data)
            _say(DATA, channel.number, data)
            return
        _say(CLOSE, channel.number)
        if channel.is_connection:
            # Its other direction goes on.
            channel.read_all = True
            return
        stream.close()
        channel.stream = None

    def _from_watch(self, channel: _Channel, watch: socket.socket) -> None:
        data = b""
        try:
            data = watch.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            pass
        if data:
            _say(WATCH, channel.number, data)
            return
        watch.close()
        channel.watch = None
        _say(UNWATCH, channel.number)

    def _from_asking(self, channel: _Channel, asking: socket.socket) -> None:
        data = b""
        try:
            data = asking.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            pass
        if data:
            _say(ASK, channel.number, data)
            return
        asking.close()
        channel.asking = None

    def _reap(self) -> None:
        """Collect every child that has ended; as the container's first process this one inherits orphans."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._children, 4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _say(kind: int, number: int, body: bytes = b"") -> None:
    """A block to the host, whole. The host always reads on, so this never waits for long."""
    data = memoryview(HEADER.pack(kind, number, len(body)) + body)
    while data:
        data = data[os.write(1, data) :]


def serve() -> NoReturn:
    """Entry: standard input and output are the stream, from here on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        supervisor.serve(theirs)
        sys.exit(0)
    theirs.close()
    # In a container of one session that session runs as the same user, and sees this process.
    isolation.set_dumpable(value=False)
    try:
        Tunnel(ours).run()
    finally:
        os._exit(0)
